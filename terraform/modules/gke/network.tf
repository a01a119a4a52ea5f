resource "google_compute_network" "this" {
  name                    = var.name
  project                 = var.project
  auto_create_subnetworks = false
}

resource "google_compute_subnetwork" "nodes" {
  name                     = "${var.name}-nodes"
  project                  = var.project
  region                   = var.region
  network                  = google_compute_network.this.id
  ip_cidr_range            = var.nodes_cidr
  private_ip_google_access = true

  secondary_ip_range {
    range_name    = "pods"
    ip_cidr_range = var.pods_cidr
  }

  secondary_ip_range {
    range_name    = "services"
    ip_cidr_range = var.services_cidr
  }

  # A tenth of the packets: enough to see who speaks to 7443, and a tenth of the price.
  log_config {
    aggregation_interval = "INTERVAL_10_MIN"
    flow_sampling        = 0.1
    metadata             = "INCLUDE_ALL_METADATA"
  }
}

# Nodes have no public address. This lets them pull images from outside, and lets nobody in.
resource "google_compute_router" "this" {
  name    = var.name
  project = var.project
  region  = var.region
  network = google_compute_network.this.id
}

resource "google_compute_router_nat" "this" {
  name                               = var.name
  project                            = var.project
  region                             = var.region
  router                             = google_compute_router.this.name
  nat_ip_allocate_option             = "AUTO_ONLY"
  source_subnetwork_ip_ranges_to_nat = "LIST_OF_SUBNETWORKS"

  subnetwork {
    name                    = google_compute_subnetwork.nodes.id
    source_ip_ranges_to_nat = ["ALL_IP_RANGES"]
  }
}

# Agents among themselves, and the coordinator, which is a pod, to them. Mutual TLS is behind it.
resource "google_compute_firewall" "agents" {
  name                    = "${var.name}-agents"
  project                 = var.project
  network                 = google_compute_network.this.id
  direction               = "INGRESS"
  source_ranges           = [var.nodes_cidr, var.pods_cidr]
  target_service_accounts = [google_service_account.nodes.email]

  allow {
    protocol = "tcp"
    ports    = ["7443"]
  }
}

# The API server asks the coordinator about evictions. GKE opens 443 and 10250 for it, and nothing else.
resource "google_compute_firewall" "evictions" {
  name                    = "${var.name}-evictions"
  project                 = var.project
  network                 = google_compute_network.this.id
  direction               = "INGRESS"
  source_ranges           = [var.control_plane_cidr]
  target_service_accounts = [google_service_account.nodes.email]

  allow {
    protocol = "tcp"
    ports    = ["7446"]
  }
}
