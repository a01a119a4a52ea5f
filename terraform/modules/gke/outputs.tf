output "name" {
  description = "The cluster's name."
  value       = google_container_cluster.this.name
}

output "membership" {
  description = "The cluster's membership in the fleet, as Connect gateway calls it."
  value       = google_container_cluster.this.fleet[0].membership
}

output "credentials_command" {
  description = "What makes a kubeconfig that goes through Connect gateway."
  value       = "gcloud container fleet memberships get-credentials ${var.name} --project ${var.project} --location ${var.region}"
}

output "workload_pool" {
  description = "The pool of Workload Identity, for bindings of your own."
  value       = "${var.project}.svc.id.goog"
}

output "node_service_account" {
  description = "The account of the nodes."
  value       = google_service_account.nodes.email
}

output "network" {
  description = "The network's id."
  value       = google_compute_network.this.id
}
