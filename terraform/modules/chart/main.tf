locals {
  chart = coalesce(var.chart, "${path.module}/../../../deploy/helm/podferry")
}

resource "helm_release" "podferry" {
  name             = "podferry"
  chart            = local.chart
  version          = var.chart_version
  namespace        = var.namespace
  create_namespace = true

  # The hook that takes podferry off the nodes waits for pods of the class: 60 s, and 4 minutes more.
  timeout = 600
  wait    = true

  values = concat([yamlencode({
    image         = { repository = var.image_repository, tag = var.image_tag }
    eviction      = { enabled = var.eviction }
    networkPolicy = { enabled = true }
  })], var.values)
}
