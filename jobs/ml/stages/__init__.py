"""The work of each stage. Its job imports it, and torch with it, only when there is work to do."""
