"""Files: found on disk or on the Hub, read by container, written whole or not at all."""
