"""Rewritten how? The segments of one model, from calibration to verified nodes."""
