terraform {
  required_version = ">= 1.9"

  required_providers {
    google = {
      source  = "hashicorp/google"
      version = "~> 6.50"
    }
    helm = {
      source  = "hashicorp/helm"
      version = "~> 3.1"
    }
  }
}

variable "project" {
  description = "The project's id."
  type        = string
}

variable "region" {
  description = "The region."
  type        = string
  default     = "europe-west3"
}

variable "image_repository" {
  description = "Where the nodes pull podferry's image from."
  type        = string
}

variable "deletion_protection" {
  description = "Whether cluster and reports are kept from `terraform destroy`."
  type        = bool
  default     = true
}

provider "google" {
  project = var.project
  region  = var.region
}

data "google_client_config" "this" {}

data "google_project" "this" {}

# Through Connect gateway, whose certificate is a public one.
provider "helm" {
  kubernetes = {
    host  = "https://${var.region}-connectgateway.googleapis.com/v1/projects/${data.google_project.this.number}/locations/${var.region}/gkeMemberships/${module.cluster.name}"
    token = data.google_client_config.this.access_token
  }
}

module "cluster" {
  source = "../.."

  project             = var.project
  region              = var.region
  zones               = ["${var.region}-a"]
  image_repository    = var.image_repository
  deletion_protection = var.deletion_protection
}

# Reports of the experiment.
resource "google_storage_bucket" "reports" {
  # checkov:skip=CKV_GCP_62: Access logs of a bucket that one pod writes to would need a second bucket.
  name                        = "${var.project}-podferry-reports"
  project                     = var.project
  location                    = var.region
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"
  force_destroy               = !var.deletion_protection

  versioning {
    enabled = true
  }

  lifecycle_rule {
    condition {
      age = 90
    }

    action {
      type = "Delete"
    }
  }
}

# Workload Identity: the service account `reporter` of the namespace `experiment` may add objects, and not read, change or delete them.
resource "google_storage_bucket_iam_member" "reporter" {
  bucket = google_storage_bucket.reports.name
  role   = "roles/storage.objectCreator"
  member = "principal://iam.googleapis.com/projects/${data.google_project.this.number}/locations/global/workloadIdentityPools/${module.cluster.workload_pool}/subject/ns/experiment/sa/reporter"
}

output "credentials_command" {
  description = "What makes a kubeconfig."
  value       = module.cluster.credentials_command
}

output "reports" {
  description = "Where reports go."
  value       = google_storage_bucket.reports.url
}
