# One role per kind of service account, each for its own prefix of the bucket and nothing else.
locals {
  accounts = {
    crane-jobs = {
      subjects = ["crane:crane-job", "crane:crane-spark", "crane:crane-spark-executor"]
      prefixes = ["store"]
    }
    crane-registry = {
      subjects = ["crane:crane-mlflow"]
      prefixes = ["mlflow"]
    }
    crane-airflow = {
      subjects = ["airflow:airflow-scheduler", "airflow:airflow-triggerer", "airflow:airflow-api-server"]
      prefixes = ["airflow-logs"]
    }
  }
  oidc_issuer = regex("oidc-provider/(.+)$", var.oidc_provider_arn)[0]
}

data "aws_iam_policy_document" "assume" {
  for_each = local.accounts
  statement {
    actions = ["sts:AssumeRoleWithWebIdentity"]
    principals {
      type        = "Federated"
      identifiers = [var.oidc_provider_arn]
    }
    condition {
      test     = "StringEquals"
      variable = "${local.oidc_issuer}:sub"
      values   = [for subject in each.value.subjects : "system:serviceaccount:${subject}"]
    }
    condition {
      test     = "StringEquals"
      variable = "${local.oidc_issuer}:aud"
      values   = ["sts.amazonaws.com"]
    }
  }
}

data "aws_iam_policy_document" "account" {
  for_each = local.accounts
  statement {
    sid       = "List"
    actions   = ["s3:ListBucket"]
    resources = [aws_s3_bucket.artifacts.arn]
    condition {
      test     = "StringLike"
      variable = "s3:prefix"
      values   = [for prefix in each.value.prefixes : "${prefix}/*"]
    }
  }
  statement {
    sid       = "Objects"
    actions   = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"]
    resources = [for prefix in each.value.prefixes : "${aws_s3_bucket.artifacts.arn}/${prefix}/*"]
  }
  statement {
    sid       = "Key"
    actions   = ["kms:Decrypt", "kms:GenerateDataKey"]
    resources = [aws_kms_key.crane.arn]
  }
}

resource "aws_iam_role" "account" {
  for_each             = local.accounts
  name                 = each.key
  assume_role_policy   = data.aws_iam_policy_document.assume[each.key].json
  max_session_duration = 43200
}

resource "aws_iam_role_policy" "account" {
  for_each = local.accounts
  name     = "bucket"
  role     = aws_iam_role.account[each.key].id
  policy   = data.aws_iam_policy_document.account[each.key].json
}
