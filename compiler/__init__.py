"""The compiler: recipes, the pipeline, calibration, verification, reports and the command line."""
