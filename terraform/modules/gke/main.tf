locals {
  labels = merge({ app = "podferry", cluster = var.name }, var.labels)
  pools = {
    on-demand = { spot = false, size = var.on_demand }
    spot      = { spot = true, size = var.spot }
  }
}

# What a node may do in the project: write logs and metrics, and read images. Agents and coordinator ask Google for nothing.
resource "google_service_account" "nodes" {
  account_id   = "${var.name}-nodes"
  project      = var.project
  display_name = "Nodes of the cluster ${var.name}"
}

resource "google_project_iam_member" "nodes" {
  project = var.project
  role    = "roles/container.defaultNodeServiceAccount"
  member  = google_service_account.nodes.member
}

resource "google_artifact_registry_repository_iam_member" "nodes" {
  count = var.artifact_registry == null ? 0 : 1

  project    = var.project
  location   = var.artifact_registry.location
  repository = var.artifact_registry.repository
  role       = "roles/artifactregistry.reader"
  member     = google_service_account.nodes.member
}

resource "google_container_cluster" "this" {
  # checkov:skip=CKV_GCP_21: It has labels; checkov does not work out the merge where an example calls the module.
  # checkov:skip=CKV_GCP_65: Google Groups for RBAC need a domain of Google Workspace, which an empty account has not.
  # checkov:skip=CKV_GCP_66: Binary Authorization needs attestors of the one who builds the image; the module cannot know them.
  name           = var.name
  project        = var.project
  location       = var.region
  node_locations = var.zones

  deletion_protection      = var.deletion_protection
  initial_node_count       = 1
  remove_default_node_pool = true
  enable_shielded_nodes    = true
  resource_labels          = local.labels

  network         = google_compute_network.this.id
  subnetwork      = google_compute_subnetwork.nodes.id
  networking_mode = "VPC_NATIVE"

  # kube-proxy and Calico, and not Dataplane V2 (Cilium): podferry has been tried with kube-proxy and the bridge plugin alone, and this is nearer to it.
  datapath_provider           = "LEGACY_DATAPATH"
  enable_intranode_visibility = true

  network_policy {
    enabled  = true
    provider = "CALICO"
  }

  addons_config {
    network_policy_config {
      disabled = false
    }
  }

  ip_allocation_policy {
    cluster_secondary_range_name  = "pods"
    services_secondary_range_name = "services"
  }

  private_cluster_config {
    enable_private_nodes    = true
    enable_private_endpoint = true
    master_ipv4_cidr_block  = var.control_plane_cidr
  }

  master_authorized_networks_config {
    dynamic "cidr_blocks" {
      for_each = var.authorized_networks

      content {
        display_name = cidr_blocks.key
        cidr_block   = cidr_blocks.value
      }
    }
  }

  # Connect gateway: Google's own front takes requests to the private control plane, for whom IAM allows it.
  fleet {
    project = var.project
  }

  workload_identity_config {
    workload_pool = "${var.project}.svc.id.goog"
  }

  master_auth {
    client_certificate_config {
      issue_client_certificate = false
    }
  }

  dynamic "database_encryption" {
    for_each = var.kms_key == null ? [] : [var.kms_key]

    content {
      state    = "ENCRYPTED"
      key_name = database_encryption.value
    }
  }

  release_channel {
    channel = var.release_channel
  }

  logging_config {
    enable_components = ["SYSTEM_COMPONENTS", "WORKLOADS"]
  }

  monitoring_config {
    enable_components = ["SYSTEM_COMPONENTS"]
  }

  # Of the pool that is removed at once: it is made with these, and must not have the project's default account either.
  node_config {
    service_account = google_service_account.nodes.email
    machine_type    = var.machine_type
    image_type      = var.image_type

    metadata = {
      disable-legacy-endpoints = "true"
    }

    shielded_instance_config {
      enable_secure_boot          = true
      enable_integrity_monitoring = true
    }

    workload_metadata_config {
      mode = "GKE_METADATA"
    }
  }

  lifecycle {
    # The provider shows the pools' settings here when its own pool is gone.
    ignore_changes = [node_config]
  }
}

resource "google_container_node_pool" "this" {
  for_each = local.pools

  name           = each.key
  project        = var.project
  location       = var.region
  cluster        = google_container_cluster.this.name
  node_locations = var.zones

  initial_node_count = each.value.size.min

  autoscaling {
    min_node_count = each.value.size.min
    max_node_count = each.value.size.max
  }

  management {
    auto_repair  = true
    auto_upgrade = true
  }

  # A new node is there before an old one is drained, so what is moved has a place to go to.
  upgrade_settings {
    max_surge       = 1
    max_unavailable = 0
  }

  node_config {
    service_account   = google_service_account.nodes.email
    oauth_scopes      = ["https://www.googleapis.com/auth/cloud-platform"]
    machine_type      = var.machine_type
    min_cpu_platform  = var.min_cpu_platform
    image_type        = var.image_type
    disk_type         = "pd-balanced"
    disk_size_gb      = var.disk_gb
    boot_disk_kms_key = var.kms_key
    spot              = each.value.spot
    resource_labels   = merge(local.labels, { pool = each.key })

    # The agent's label: nothing happens on a node without it.
    labels = {
      "podferry.dev/enabled" = "true"
      "podferry.dev/pool"    = each.key
    }

    metadata = {
      disable-legacy-endpoints = "true"
    }

    shielded_instance_config {
      enable_secure_boot          = true
      enable_integrity_monitoring = true
    }

    workload_metadata_config {
      mode = "GKE_METADATA"
    }
  }

  lifecycle {
    # Another one would make the pool anew.
    ignore_changes = [initial_node_count]
  }

  depends_on = [google_project_iam_member.nodes]
}

module "chart" {
  source = "../chart"
  count  = var.install_chart ? 1 : 0

  image_repository = var.image_repository
  image_tag        = var.image_tag
  values           = var.chart_values

  # So it is uninstalled, and off the nodes, before they go.
  depends_on = [
    google_container_node_pool.this,
    google_compute_firewall.agents,
    google_compute_firewall.evictions,
    google_compute_router_nat.this,
    google_artifact_registry_repository_iam_member.nodes,
  ]
}
