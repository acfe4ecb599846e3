output "bucket" {
  description = "Bucket of artifacts."
  value       = aws_s3_bucket.artifacts.bucket
}

output "role_arns" {
  description = "Roles for the annotations of the service accounts, by name."
  value       = { for name, role in aws_iam_role.account : name => role.arn }
}

output "repositories" {
  description = "Repositories for `images:` of the overlays, by name."
  value       = { for name, repository in aws_ecr_repository.image : name => repository.repository_url }
}

output "database_address" {
  description = "Host of the database."
  value       = aws_db_instance.crane.address
}

output "database_admin_secret_arn" {
  description = "Where the administrator's password is kept; nobody ever sees it here."
  value       = aws_db_instance.crane.master_user_secret[0].secret_arn
}
