{{- define "podferry.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "podferry.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "podferry.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "podferry.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "podferry.selector" -}}
app.kubernetes.io/name: {{ include "podferry.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "podferry.labels" -}}
{{ include "podferry.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "podferry.image" -}}
{{ printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) }}
{{- end -}}

{{- define "podferry.coordinatorAccount" -}}
{{ default (printf "%s-coordinator" (include "podferry.fullname" .)) .Values.serviceAccount.coordinator }}
{{- end -}}

{{- define "podferry.agentAccount" -}}
{{ default (printf "%s-agent" (include "podferry.fullname" .)) .Values.serviceAccount.agent }}
{{- end -}}

{{- define "podferry.authority" -}}
{{ default (printf "%s-authority" (include "podferry.fullname" .)) .Values.certificates.existingAuthority }}
{{- end -}}

{{/* The authority, as `podferry certificates` reads it. */}}
{{- define "podferry.authorityVolume" -}}
- name: authority
  secret:
    secretName: {{ include "podferry.authority" . }}
    defaultMode: 0440
    {{- if .Values.certificates.certManager.enabled }}
    items: [{key: tls.crt, path: ca.pem}, {key: tls.key, path: ca-key.pem}]
    {{- end }}
{{- end -}}

{{/* Takes a dict of root, name (of the peer) and folder. The container issues a certificate before the ones behind it start, and again
when half of its time is over. */}}
{{- define "podferry.certificates" -}}
- name: certificates
  image: {{ include "podferry.image" .root }}
  imagePullPolicy: {{ .root.Values.image.pullPolicy }}
  restartPolicy: Always
  command: [/bin/sh, -euc]
  args:
    - |
      # Process 1 ignores what it does not handle, and the pod would take its whole grace period to end.
      trap 'exit 0' TERM
      umask 077
      while :; do
        podferry certificates issue "{{ .name }}" "{{ .folder }}" --ca /authority --hours {{ .root.Values.certificates.hours }}
        sleep {{ mul .root.Values.certificates.hours 1800 }} & wait "$!"
      done
  startupProbe:
    exec: {command: [test, -s, {{ .folder }}/cert.pem]}
    periodSeconds: 1
    failureThreshold: 60
  resources:
    requests: {cpu: 1m, memory: 8Mi}
    limits: {memory: 64Mi}
{{- end -}}

{{- define "podferry.installFlags" -}}
{{- with .Values.install -}}
- --root=/host
{{- if .dir }}
- --dir={{ .dir }}
{{- end }}
{{- if .runtime }}
- --runtime={{ .runtime }}
{{- end }}
{{- if .containerdConfig }}
- --containerd-config={{ .containerdConfig }}
{{- end }}
- --restart={{ .restart }}
{{- if .restartCommand }}
- --restart-command={{ .restartCommand }}
{{- end }}
{{- end -}}
{{- end -}}
