# One key for bucket, registry and database.
resource "aws_kms_key" "crane" {
  description             = "CRANE artifacts, images and database"
  enable_key_rotation     = true
  deletion_window_in_days = 30
  policy                  = data.aws_iam_policy_document.key.json
}

resource "aws_kms_alias" "crane" {
  name          = "alias/crane"
  target_key_id = aws_kms_key.crane.key_id
}

data "aws_iam_policy_document" "key" {
  #checkov:skip=CKV_AWS_109:The account's administrators manage the key; without this statement nobody could.
  #checkov:skip=CKV_AWS_111:As above: a key policy names the key it belongs to as "*".
  #checkov:skip=CKV_AWS_356:As above: in a key policy "*" is this key alone.
  statement {
    sid       = "AccountAdministersTheKey"
    actions   = ["kms:*"]
    resources = ["*"]
    principals {
      type        = "AWS"
      identifiers = ["arn:${data.aws_partition.current.partition}:iam::${data.aws_caller_identity.current.account_id}:root"]
    }
  }
}
