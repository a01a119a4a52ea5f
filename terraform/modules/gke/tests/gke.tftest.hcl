mock_provider "google" {
  mock_resource "google_service_account" {
    defaults = {
      email  = "nodes@example.iam.gserviceaccount.com"
      member = "serviceAccount:nodes@example.iam.gserviceaccount.com"
    }
  }
}

mock_provider "helm" {}

variables {
  project          = "example"
  region           = "europe-west3"
  zones            = ["europe-west3-a"]
  image_repository = "registry.example/podferry"
}

run "nodes_and_control_plane_have_no_public_address" {
  assert {
    condition     = google_container_cluster.this.private_cluster_config[0].enable_private_nodes && google_container_cluster.this.private_cluster_config[0].enable_private_endpoint
    error_message = "nodes or API server would be reachable from everywhere"
  }

  assert {
    condition     = google_container_cluster.this.fleet[0].project == "example"
    error_message = "without the fleet there is no Connect gateway, and nobody reaches the API server"
  }
}

run "both_pools_have_the_agents_label" {
  command = plan

  assert {
    condition     = alltrue([for pool in google_container_node_pool.this : pool.node_config[0].labels["podferry.dev/enabled"] == "true"])
    error_message = "no agent would run there"
  }

  assert {
    condition     = google_container_node_pool.this["spot"].node_config[0].spot && !google_container_node_pool.this["on-demand"].node_config[0].spot
    error_message = "one pool of each kind"
  }
}

run "the_control_plane_reaches_the_coordinator" {
  command = plan

  assert {
    condition     = google_compute_firewall.evictions.source_ranges == toset(["172.16.0.0/28"]) && one(google_compute_firewall.evictions.allow).ports == tolist(["7446"])
    error_message = "evictions would time out, and pods be ended instead of moved"
  }
}

run "nodes_have_no_more_than_a_nodes_role" {
  command = plan

  assert {
    condition     = google_project_iam_member.nodes.role == "roles/container.defaultNodeServiceAccount" && length(google_artifact_registry_repository_iam_member.nodes) == 0
    error_message = "agents need nothing of Google's"
  }
}

run "arm64_is_refused" {
  command = plan

  variables {
    machine_type = "c4a-standard-4"
  }

  expect_failures = [var.machine_type]
}

run "images_that_podferry_does_not_know_are_refused" {
  command = plan

  variables {
    image_type = "WINDOWS_LTSC_CONTAINERD"
  }

  expect_failures = [var.image_type]
}

run "it_does_without_the_chart" {
  command = plan

  variables {
    install_chart = false
  }

  assert {
    condition     = length(module.chart) == 0
    error_message = "the chart was to be left out"
  }
}
