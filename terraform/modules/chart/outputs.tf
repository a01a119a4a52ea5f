output "namespace" {
  description = "The namespace of coordinator and agents."
  value       = helm_release.podferry.namespace
}

output "runtime_class" {
  description = "What pods that may move have as their `runtimeClassName`, unless `values` says otherwise."
  value       = "podferry"
}
