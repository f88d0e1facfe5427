"""How is it printed? Tables, bars, and names that are safe to show."""
