terraform {
  required_version = ">= 1.9"

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "~> 6.25"
    }
    helm = {
      source  = "hashicorp/helm"
      version = "~> 3.1"
    }
  }
}

variable "region" {
  description = "The region."
  type        = string
  default     = "eu-central-1"
}

variable "image_repository" {
  description = "Where the nodes pull podferry's image from."
  type        = string
}

variable "install_chart" {
  description = "False at the first apply, true when the tunnel of `tunnel_command` is open."
  type        = bool
  default     = false
}

variable "deletion_protection" {
  description = "Whether cluster and reports are kept from `terraform destroy`."
  type        = bool
  default     = true
}

provider "aws" {
  region = var.region
}

data "aws_eks_cluster_auth" "this" {
  name = module.cluster.name
}

data "aws_caller_identity" "this" {}

# Through the tunnel: the certificate is that of the API server's own name.
provider "helm" {
  kubernetes = {
    host                   = "https://127.0.0.1:8443"
    tls_server_name        = trimprefix(module.cluster.endpoint, "https://")
    cluster_ca_certificate = module.cluster.certificate_authority
    token                  = data.aws_eks_cluster_auth.this.token
  }
}

module "cluster" {
  source = "../.."

  region              = var.region
  zones               = ["${var.region}a", "${var.region}b"]
  image_repository    = var.image_repository
  install_chart       = var.install_chart
  deletion_protection = var.deletion_protection
}

# Reports of the experiment.
resource "aws_s3_bucket" "reports" {
  # checkov:skip=CKV_AWS_18: Access logs of a bucket that one pod writes to would need a second bucket.
  # checkov:skip=CKV_AWS_144: A report can be made again; a copy in another region is not worth its price.
  # checkov:skip=CKV2_AWS_62: Nobody waits for reports to arrive.
  bucket        = "${data.aws_caller_identity.this.account_id}-${var.region}-podferry-reports"
  force_destroy = !var.deletion_protection
}

resource "aws_s3_bucket_public_access_block" "reports" {
  bucket                  = aws_s3_bucket.reports.id
  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

resource "aws_s3_bucket_server_side_encryption_configuration" "reports" {
  bucket = aws_s3_bucket.reports.id

  rule {
    bucket_key_enabled = true

    apply_server_side_encryption_by_default {
      sse_algorithm     = "aws:kms"
      kms_master_key_id = module.cluster.kms_key
    }
  }
}

resource "aws_s3_bucket_versioning" "reports" {
  bucket = aws_s3_bucket.reports.id

  versioning_configuration {
    status = "Enabled"
  }
}

resource "aws_s3_bucket_lifecycle_configuration" "reports" {
  bucket = aws_s3_bucket.reports.id

  rule {
    id     = "old"
    status = "Enabled"

    filter {}

    expiration {
      days = 90
    }

    noncurrent_version_expiration {
      noncurrent_days = 7
    }

    abort_incomplete_multipart_upload {
      days_after_initiation = 1
    }
  }
}

# Pod Identity: the service account `reporter` of the namespace `experiment` may add objects, and not read or delete them.
resource "aws_iam_role" "reporter" {
  name = "podferry-reporter"

  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Action    = ["sts:AssumeRole", "sts:TagSession"]
      Principal = { Service = "pods.eks.amazonaws.com" }
    }]
  })
}

resource "aws_iam_role_policy" "reporter" {
  name = "add-reports"
  role = aws_iam_role.reporter.id

  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [
      { Effect = "Allow", Action = ["s3:PutObject"], Resource = "${aws_s3_bucket.reports.arn}/*" },
      { Effect = "Allow", Action = ["kms:GenerateDataKey"], Resource = module.cluster.kms_key },
    ]
  })
}

resource "aws_eks_pod_identity_association" "reporter" {
  cluster_name    = module.cluster.name
  namespace       = "experiment"
  service_account = "reporter"
  role_arn        = aws_iam_role.reporter.arn
}

output "tunnel_command" {
  description = "What opens the way to the API server."
  value       = module.cluster.tunnel_command
}

output "reports" {
  description = "Where reports go."
  value       = "s3://${aws_s3_bucket.reports.bucket}"
}
