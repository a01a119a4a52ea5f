output "name" {
  description = "The cluster's name."
  value       = aws_eks_cluster.this.name
}

output "endpoint" {
  description = "The API server's URL. It leads to private addresses, unless networks are named that may reach a public endpoint."
  value       = aws_eks_cluster.this.endpoint
}

output "certificate_authority" {
  description = "The API server's authority, as PEM."
  value       = base64decode(aws_eks_cluster.this.certificate_authority[0].data)
}

output "tunnel_command" {
  description = "What forwards port 8443 of this machine to the API server through a node, by Session Manager. Put the id of any node's instance in the place of INSTANCE."
  value       = "aws ssm start-session --region ${var.region} --target INSTANCE --document-name AWS-StartPortForwardingSessionToRemoteHost --parameters host=${trimprefix(aws_eks_cluster.this.endpoint, "https://")},portNumber=443,localPortNumber=8443"
}

output "node_role" {
  description = "The role of the nodes."
  value       = aws_iam_role.nodes.arn
}

output "kms_key" {
  description = "The key of Secrets and logs."
  value       = aws_kms_key.this.arn
}
