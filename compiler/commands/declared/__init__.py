"""The options of each command, apart from what runs it, so that its help answers at once."""
