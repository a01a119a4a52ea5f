mock_provider "helm" {}

variables {
  image_repository = "registry.example/podferry"
}

run "evictions_become_migrations_by_default" {
  command = plan

  assert {
    condition     = yamldecode(helm_release.podferry.values[0]).eviction.enabled
    error_message = "a drained node's pods would be ended"
  }
}

run "own_values_come_last" {
  command = plan

  variables {
    values = ["coordinator: {replicas: 3}"]
  }

  assert {
    condition     = helm_release.podferry.values[1] == "coordinator: {replicas: 3}"
    error_message = "own values have to win over the module's"
  }
}

run "uninstalling_has_time_for_the_hook" {
  command = plan

  assert {
    condition     = helm_release.podferry.timeout >= 300
    error_message = "helm would give up before the nodes are clean"
  }
}
