locals {
  tags  = merge({ app = "podferry", cluster = var.name }, var.tags)
  pools = { on-demand = merge(var.on_demand, { capacity = "ON_DEMAND" }), spot = merge(var.spot, { capacity = "SPOT" }) }

  # Before the nodes, and behind them: CoreDNS waits for a node to run on.
  early_addons = {
    vpc-cni                = jsonencode({ enableNetworkPolicy = "true" })
    kube-proxy             = null
    eks-pod-identity-agent = null
  }
}

resource "aws_cloudwatch_log_group" "cluster" {
  name              = "/aws/eks/${var.name}/cluster"
  retention_in_days = var.log_days
  kms_key_id        = aws_kms_key.this.arn
  tags              = local.tags
}

resource "aws_eks_cluster" "this" {
  # checkov:skip=CKV_AWS_39: The public endpoint is off unless networks are named, and never open to all; the variable's default and validation say so.
  name                          = var.name
  role_arn                      = aws_iam_role.cluster.arn
  version                       = var.kubernetes_version
  enabled_cluster_log_types     = ["api", "audit", "authenticator", "controllerManager", "scheduler"]
  bootstrap_self_managed_addons = false
  deletion_protection           = var.deletion_protection
  tags                          = local.tags

  access_config {
    authentication_mode                         = "API"
    bootstrap_cluster_creator_admin_permissions = true
  }

  encryption_config {
    resources = ["secrets"]

    provider {
      key_arn = aws_kms_key.this.arn
    }
  }

  # No security groups of our own: nodes and control plane share the one that EKS makes, in which all may speak with all. That has in it what podferry
  # needs: 7443 among the nodes, and 7446 from the control plane to the coordinator.
  vpc_config {
    subnet_ids              = aws_subnet.private[*].id
    endpoint_private_access = true
    endpoint_public_access  = length(var.public_access_cidrs) > 0
    public_access_cidrs     = length(var.public_access_cidrs) > 0 ? var.public_access_cidrs : null
  }

  upgrade_policy {
    support_type = "STANDARD"
  }

  # What it writes and makes has to be able to be taken away at the end.
  depends_on = [aws_iam_role_policy_attachment.cluster, aws_cloudwatch_log_group.cluster, aws_route_table_association.private]
}

resource "aws_eks_addon" "early" {
  for_each = local.early_addons

  cluster_name         = aws_eks_cluster.this.name
  addon_name           = each.key
  configuration_values = each.value
  tags                 = local.tags

  dynamic "pod_identity_association" {
    for_each = each.key == "vpc-cni" ? [aws_iam_role.cni.arn] : []

    content {
      role_arn        = pod_identity_association.value
      service_account = "aws-node"
    }
  }

  depends_on = [aws_iam_role_policy_attachment.cni]
}

resource "aws_eks_addon" "dns" {
  cluster_name = aws_eks_cluster.this.name
  addon_name   = "coredns"
  tags         = local.tags

  depends_on = [aws_eks_node_group.this]
}

resource "aws_launch_template" "nodes" {
  name = "${var.name}-nodes"
  tags = local.tags

  block_device_mappings {
    device_name = "/dev/xvda"

    ebs {
      encrypted             = true
      volume_type           = "gp3"
      volume_size           = var.disk_gb
      delete_on_termination = true
    }
  }

  # One hop: pods cannot ask for the node's credentials. The agent, in the node's network, has no need to.
  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
  }

  monitoring {
    enabled = true
  }

  dynamic "tag_specifications" {
    for_each = toset(["instance", "volume", "network-interface"])

    content {
      resource_type = tag_specifications.value
      tags          = merge(local.tags, { Name = "${var.name}-node" })
    }
  }
}

resource "aws_eks_node_group" "this" {
  for_each = local.pools

  cluster_name    = aws_eks_cluster.this.name
  node_group_name = each.key
  node_role_arn   = aws_iam_role.nodes.arn
  subnet_ids      = slice(aws_subnet.private[*].id, 0, var.node_zones)
  capacity_type   = each.value.capacity
  instance_types  = var.instance_types
  ami_type        = var.ami_type
  tags            = merge(local.tags, { pool = each.key })

  # The agent's label: nothing happens on a node without it.
  labels = {
    "podferry.dev/enabled" = "true"
    "podferry.dev/pool"    = each.key
  }

  launch_template {
    id      = aws_launch_template.nodes.id
    version = aws_launch_template.nodes.latest_version
  }

  scaling_config {
    min_size     = each.value.min
    max_size     = each.value.max
    desired_size = each.value.min
  }

  # One after the other, so that what is moved has a place to go to.
  update_config {
    max_unavailable = 1
  }

  lifecycle {
    # An autoscaler's.
    ignore_changes = [scaling_config[0].desired_size]
  }

  depends_on = [aws_iam_role_policy_attachment.nodes, aws_eks_addon.early]
}

module "chart" {
  source = "../chart"
  count  = var.install_chart ? 1 : 0

  image_repository = var.image_repository
  image_tag        = var.image_tag
  values           = var.chart_values

  # So it is uninstalled, and off the nodes, before they go.
  depends_on = [aws_eks_node_group.this, aws_eks_addon.dns, aws_nat_gateway.this, aws_route_table_association.public]
}
