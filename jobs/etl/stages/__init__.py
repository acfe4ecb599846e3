"""The work of each stage. Its job imports it, and PySpark with it, only when there is work to do."""
