variable "project" {
  description = "The project's id."
  type        = string
}

variable "region" {
  description = "The region. The cluster is regional: its control plane is in three zones."
  type        = string
}

variable "zones" {
  description = "Zones of the nodes. One zone by default: traffic between zones is charged, and a migration is traffic."
  type        = list(string)

  validation {
    condition     = length(var.zones) > 0
    error_message = "Name at least one zone."
  }
}

variable "name" {
  description = "The cluster's name, and the beginning of all other names."
  type        = string
  default     = "podferry"

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{0,19}$", var.name))
    error_message = "At most 20 small letters, digits and hyphens, a letter first: service accounts' names end at 30."
  }
}

variable "labels" {
  description = "Labels of all that can have some, for the bill."
  type        = map(string)
  default     = {}
}

variable "nodes_cidr" {
  description = "Addresses of the nodes."
  type        = string
  default     = "10.20.0.0/22"
}

variable "pods_cidr" {
  description = "Addresses of the pods."
  type        = string
  default     = "10.24.0.0/16"
}

variable "services_cidr" {
  description = "Addresses of the Services."
  type        = string
  default     = "10.25.0.0/20"
}

variable "control_plane_cidr" {
  description = "Addresses of the control plane: a /28."
  type        = string
  default     = "172.16.0.0/28"

  validation {
    condition     = endswith(var.control_plane_cidr, "/28")
    error_message = "GKE takes a /28 only."
  }
}

variable "authorized_networks" {
  description = "Networks that may reach the control plane's private address, by name: of a VPN or an interconnect. Nobody needs one who uses Connect gateway."
  type        = map(string)
  default     = {}
}

variable "release_channel" {
  description = "RAPID, REGULAR or STABLE."
  type        = string
  default     = "REGULAR"
}

variable "machine_type" {
  description = "Of all nodes: both nodes of a migration need the same features of the CPU. x86-64 only; the engine has no arm64 yet."
  type        = string
  default     = "n2-standard-4"

  validation {
    condition     = !can(regex("^(t2a|c4a|n4a|a4x)-", var.machine_type))
    error_message = "This is an arm64 machine. podferry's engine runs on x86-64 only."
  }
}

variable "min_cpu_platform" {
  description = "The oldest CPU that a node may have. Without it, nodes of one machine type have different ones, and pods move to a newer one only."
  type        = string
  default     = "Intel Ice Lake"
}

variable "image_type" {
  description = "COS_CONTAINERD or UBUNTU_CONTAINERD. Ubuntu's kernel has what live migration needs; see docs/cloud.md."
  type        = string
  default     = "UBUNTU_CONTAINERD"

  validation {
    condition     = contains(["COS_CONTAINERD", "UBUNTU_CONTAINERD"], var.image_type)
    error_message = "podferry knows how to install itself on COS_CONTAINERD and UBUNTU_CONTAINERD."
  }
}

variable "disk_gb" {
  description = "Size of a node's disk, in GB. It has room for what arrives: a container's writable layer and volumes."
  type        = number
  default     = 50
}

variable "on_demand" {
  description = "Fewest and most on-demand nodes in each zone."
  type        = object({ min = number, max = number })
  default     = { min = 1, max = 3 }
}

variable "spot" {
  description = "Fewest and most spot nodes in each zone."
  type        = object({ min = number, max = number })
  default     = { min = 1, max = 3 }
}

variable "kms_key" {
  description = "A key of Cloud KMS for Secrets in etcd and for the nodes' disks. Null leaves both to Google's own encryption: a key that this module made could never be deleted."
  type        = string
  default     = null
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

variable "artifact_registry" {
  description = "The Artifact Registry repository that the nodes may read: its location and id. Null where the image is elsewhere."
  type        = object({ location = string, repository = string })
  default     = null
}

variable "install_chart" {
  description = "Whether the chart is installed, which needs the helm provider to reach the cluster."
  type        = bool
  default     = true
}

variable "chart_values" {
  description = "Further values of the chart, each a YAML document."
  type        = list(string)
  default     = []
}
