"""The library behind the CRANE pipeline: everything that is worth testing without Spark or Airflow."""
