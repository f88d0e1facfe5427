"""How is a setting declared? Once, by a field; and how names with parameters are written."""
