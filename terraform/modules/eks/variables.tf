variable "region" {
  description = "The region. For names only: the provider decides where things are made."
  type        = string
}

variable "zones" {
  description = "Two or more availability zones: EKS wants its control plane in two."
  type        = list(string)

  validation {
    condition     = length(var.zones) >= 2
    error_message = "EKS needs subnets in at least two zones."
  }
}

variable "node_zones" {
  description = "How many of the zones, from the first, have nodes. One by default: traffic between zones is charged, and a migration is traffic."
  type        = number
  default     = 1

  validation {
    condition     = var.node_zones >= 1
    error_message = "Nodes have to be somewhere."
  }
}

variable "name" {
  description = "The cluster's name, and the beginning of all other names."
  type        = string
  default     = "podferry"

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{0,29}$", var.name))
    error_message = "At most 30 small letters, digits and hyphens, a letter first."
  }
}

variable "tags" {
  description = "Tags of all that can have some, for the bill."
  type        = map(string)
  default     = {}
}

variable "vpc_cidr" {
  description = "Addresses of the VPC: a /16. Pods have addresses of it, too."
  type        = string
  default     = "10.30.0.0/16"
}

variable "kubernetes_version" {
  description = "The Kubernetes version. It decides the nodes' kernel: 6.12 with 1.33 to 1.35, 6.18 from 1.36 on, and 6.1 before, which has no asynchronous write protection."
  type        = string
  default     = "1.35"

  validation {
    condition     = can(tonumber(var.kubernetes_version)) && tonumber(split(".", var.kubernetes_version)[1]) >= 33
    error_message = "Nodes of Kubernetes before 1.33 have Linux 6.1, which has no asynchronous write protection."
  }
}

variable "public_access_cidrs" {
  description = "Networks that may reach a public endpoint of the API server. Empty, the default, has none: the API server is reached through a node by Session Manager."
  type        = list(string)
  default     = []

  validation {
    condition     = !contains(var.public_access_cidrs, "0.0.0.0/0")
    error_message = "Name your own networks, and not all."
  }
}

variable "instance_types" {
  description = "Of all nodes, of one family: both nodes of a migration need the same features of the CPU. x86-64 only; the engine has no arm64 yet."
  type        = list(string)
  default     = ["m6i.xlarge"]

  validation {
    condition     = length(distinct([for type in var.instance_types : split(".", type)[0]])) == 1
    error_message = "Instances of different families have different CPUs: pods would move one way only, or not at all."
  }

  validation {
    condition     = alltrue([for type in var.instance_types : !can(regex("^([a-z]+[0-9]+g[a-z]*|a1)\\.", type))])
    error_message = "This is an arm64 instance (Graviton). podferry's engine runs on x86-64 only."
  }
}

variable "ami_type" {
  description = "AL2023_x86_64_STANDARD. Bottlerocket's root cannot be changed, so podferry does not install itself there."
  type        = string
  default     = "AL2023_x86_64_STANDARD"

  validation {
    condition     = startswith(var.ami_type, "AL2023_x86_64")
    error_message = "podferry knows how to install itself on Amazon Linux 2023 on x86-64."
  }
}

variable "disk_gb" {
  description = "Size of a node's disk, in GiB. It has room for what arrives: a container's writable layer and volumes."
  type        = number
  default     = 50
}

variable "on_demand" {
  description = "Fewest and most on-demand nodes."
  type        = object({ min = number, max = number })
  default     = { min = 1, max = 3 }
}

variable "spot" {
  description = "Fewest and most spot nodes."
  type        = object({ min = number, max = number })
  default     = { min = 1, max = 3 }
}

variable "log_days" {
  description = "How long logs of the control plane and of the network are kept, in days."
  type        = number
  default     = 365
}

variable "deletion_protection" {
  description = "Whether the cluster refuses to be destroyed. True, because `terraform destroy` in the wrong folder ends every workload; set it to false and apply before you destroy."
  type        = bool
  default     = true
}

variable "image_repository" {
  description = "Where the nodes pull podferry's image from."
  type        = string
}

variable "image_tag" {
  description = "The image's tag. Empty takes the chart's appVersion."
  type        = string
  default     = ""
}

variable "install_chart" {
  description = "Whether the chart is installed, which needs the helm provider to reach the cluster. Without a public endpoint: apply with false, open the tunnel, apply with true."
  type        = bool
  default     = true
}

variable "chart_values" {
  description = "Further values of the chart, each a YAML document."
  type        = list(string)
  default     = []
}
