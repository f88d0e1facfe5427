"""What is on disk? Models and their data: read, checked, written, published."""
