# The cloud side of a cluster that is already there: bucket, keys, roles of the service accounts, registry, database.
terraform {
  required_version = ">= 1.9"
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "~> 6.0"
    }
  }
  # State holds no secret, but say where it lives: terraform init -backend-config=...
  backend "s3" {}
}

provider "aws" {
  region = var.region
  default_tags {
    tags = { project = "crane" }
  }
}

data "aws_caller_identity" "current" {}
data "aws_partition" "current" {}
