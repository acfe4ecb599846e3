"""Make the bucket of the development stack and the database of its MLflow, where they are not there yet."""

import contextlib
import os

import boto3
import psycopg2
from psycopg2 import errors

s3 = boto3.client("s3")
with contextlib.suppress(s3.exceptions.BucketAlreadyOwnedByYou):
    s3.create_bucket(Bucket="crane")

connection = psycopg2.connect(host="database", user="airflow", password=os.environ["PGPASSWORD"], dbname="airflow")
connection.autocommit = True
with contextlib.suppress(errors.DuplicateDatabase), connection.cursor() as cursor:
    cursor.execute("CREATE DATABASE mlflow")
