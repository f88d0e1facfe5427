"""What can be asked for? Whole jobs, the same for the commands and for `import qcompile`."""
