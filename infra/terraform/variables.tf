variable "region" {
  description = "Region of everything."
  type        = string
}

variable "bucket" {
  description = "Name of the bucket of artifacts; infra/airflow/values.yaml and infra/kubernetes name it too."
  type        = string
  default     = "crane-artifacts"
}

variable "log_bucket" {
  description = "An existing bucket for access logs."
  type        = string
}

variable "oidc_provider_arn" {
  description = "ARN of the cluster's OIDC provider, which vouches for service accounts."
  type        = string
}

variable "vpc_id" {
  description = "Network of the cluster."
  type        = string
}

variable "database_subnet_ids" {
  description = "Private subnets for the database, in two zones at least."
  type        = list(string)
}

variable "cluster_security_group_id" {
  description = "Security group of the cluster's nodes: the only ones that reach the database."
  type        = string
}

variable "database_class" {
  description = "Instance class of the database."
  type        = string
  default     = "db.t4g.medium"
}

variable "keep_days" {
  description = "Days after which an artifact that no run has read moves to cheaper storage."
  type        = number
  default     = 90
}
