"""Shipped how? The folder that an application copies."""
