"""What stands between the markers of the documents, by subject; see `tables.py`."""
