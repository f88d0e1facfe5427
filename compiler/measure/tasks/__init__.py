"""Task sets that need no download: choices among a few answers, made from texts and packages that are here."""
