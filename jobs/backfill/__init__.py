"""Jobs that rebuild past days."""
