variable "chart" {
  description = "The chart: a folder, or its name in a registry. Null takes the one of this repository."
  type        = string
  default     = null
}

variable "chart_version" {
  description = "The chart's version, where `chart` is in a registry."
  type        = string
  default     = null
}

variable "image_repository" {
  description = "Where the nodes pull podferry's image from. There is no public one yet: build it by `make image` and push it."
  type        = string
}

variable "image_tag" {
  description = "The image's tag. Empty takes the chart's appVersion."
  type        = string
  default     = ""
}

variable "namespace" {
  description = "The namespace, which is made. Privileged pods must be allowed in it."
  type        = string
  default     = "podferry"
}

variable "eviction" {
  description = "Whether evictions become migrations: what makes a drained or reclaimed node's pods move."
  type        = bool
  default     = true
}

variable "values" {
  description = "Further values of the chart, each a YAML document; later ones win."
  type        = list(string)
  default     = []
}
