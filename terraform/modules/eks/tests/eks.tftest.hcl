mock_provider "aws" {
  mock_resource "aws_eks_cluster" {
    defaults = {
      endpoint              = "https://ABC.eks.example"
      certificate_authority = [{ data = "UEVN" }]
    }
  }
}

mock_provider "helm" {}

variables {
  region           = "eu-central-1"
  zones            = ["eu-central-1a", "eu-central-1b"]
  image_repository = "registry.example/podferry"
}

run "there_is_no_public_endpoint_by_default" {
  assert {
    condition     = !aws_eks_cluster.this.vpc_config[0].endpoint_public_access && aws_eks_cluster.this.vpc_config[0].endpoint_private_access
    error_message = "the API server would be reachable from everywhere"
  }

  assert {
    condition     = strcontains(output.tunnel_command, "host=ABC.eks.example,")
    error_message = "the tunnel has to lead to the API server's name, without https://"
  }
}

run "a_public_endpoint_is_for_named_networks" {
  command = plan

  variables {
    public_access_cidrs = ["192.0.2.0/24"]
  }

  assert {
    condition     = aws_eks_cluster.this.vpc_config[0].endpoint_public_access && aws_eks_cluster.this.vpc_config[0].public_access_cidrs == toset(["192.0.2.0/24"])
    error_message = "only the named networks may reach it"
  }
}

run "a_public_endpoint_for_all_is_refused" {
  command = plan

  variables {
    public_access_cidrs = ["0.0.0.0/0"]
  }

  expect_failures = [var.public_access_cidrs]
}

run "both_pools_have_the_agents_label" {
  command = plan

  assert {
    condition     = alltrue([for pool in aws_eks_node_group.this : pool.labels["podferry.dev/enabled"] == "true"])
    error_message = "no agent would run there"
  }

  assert {
    condition     = aws_eks_node_group.this["spot"].capacity_type == "SPOT" && aws_eks_node_group.this["on-demand"].capacity_type == "ON_DEMAND"
    error_message = "one pool of each kind"
  }
}

run "disks_are_encrypted_and_metadata_is_not_for_pods" {
  command = plan

  assert {
    condition     = tobool(aws_launch_template.nodes.block_device_mappings[0].ebs[0].encrypted) && aws_launch_template.nodes.metadata_options[0].http_put_response_hop_limit == 1
    error_message = "a pod could read a node's disk or credentials"
  }
}

run "graviton_is_refused" {
  command = plan

  variables {
    instance_types = ["m7g.xlarge"]
  }

  expect_failures = [var.instance_types]
}

run "cpus_of_two_families_are_refused" {
  command = plan

  variables {
    instance_types = ["m6i.xlarge", "m5.xlarge"]
  }

  expect_failures = [var.instance_types]
}

run "kernels_without_asynchronous_write_protection_are_refused" {
  command = plan

  variables {
    kubernetes_version = "1.32"
  }

  expect_failures = [var.kubernetes_version]
}

run "bottlerocket_is_refused" {
  command = plan

  variables {
    ami_type = "BOTTLEROCKET_x86_64"
  }

  expect_failures = [var.ami_type]
}
