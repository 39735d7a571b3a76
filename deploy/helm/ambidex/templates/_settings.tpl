{{/* What the distributions differ in: keys of .cni, hostPID, seLinuxType and resourceQuota. */}}
{{- define "ambidex.platforms" -}}
gke:
  binDir: /home/kubernetes/bin
  resourceQuota: true
k3s:
  binDir: /var/lib/rancher/k3s/data/cni
  confDir: /var/lib/rancher/k3s/agent/etc/cni/net.d
k3d:
  binDir: /var/lib/rancher/k3s/data/cni
  confDir: /var/lib/rancher/k3s/agent/etc/cni/net.d
microk8s:
  binDir: /var/snap/microk8s/current/opt/cni/bin
  confDir: /var/snap/microk8s/current/args/cni-network
minikube:
  netnsDir: /var/run/docker/netns
openshift:
  binDir: /var/lib/cni/bin
  confDir: /etc/cni/multus/net.d
  chained: false
  seLinuxType: spc_t
{{- end -}}

{{/* All settings that depend on the platform, as a dictionary; what the values say wins. */}}
{{- define "ambidex.settings" -}}
{{- $platform := dict -}}
{{- if .Values.platform -}}
{{- $platform = get (include "ambidex.platforms" . | fromYaml) .Values.platform -}}
{{- end -}}
{{- $chained := true -}}
{{- if hasKey $platform "chained" -}}{{- $chained = $platform.chained -}}{{- end -}}
{{- if kindIs "bool" .Values.cni.chained -}}{{- $chained = .Values.cni.chained -}}{{- end -}}
{{- $quota := $platform.resourceQuota | default false -}}
{{- if kindIs "bool" .Values.resourceQuota.enabled -}}{{- $quota = .Values.resourceQuota.enabled -}}{{- end -}}
binDir: {{ .Values.cni.binDir | default $platform.binDir | default "/opt/cni/bin" }}
confDir: {{ .Values.cni.confDir | default $platform.confDir | default "/etc/cni/net.d" }}
netnsDir: {{ .Values.cni.netnsDir | default $platform.netnsDir | default "/var/run/netns" }}
chained: {{ $chained }}
seLinuxType: {{ .Values.seLinuxType | default $platform.seLinuxType | default "" | quote }}
resourceQuota: {{ $quota }}
usesNode: {{ ne .Values.mode "inpod" }}
{{- end -}}

{{- define "ambidex.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}

{{/* Labels of an object of a component; the argument is a list of the root and the component's name. */}}
{{- define "ambidex.labels" -}}
app.kubernetes.io/name: {{ index . 1 }}
app.kubernetes.io/part-of: ambidex
app.kubernetes.io/version: {{ (index . 0).Chart.AppVersion | quote }}
{{- end -}}

{{/* Environment from a map of the values. */}}
{{- define "ambidex.env" -}}
{{- $variables := list -}}
{{- range $name, $value := . -}}
{{- $variables = append $variables (dict "name" $name "value" (toString $value)) -}}
{{- end -}}
{{- toYaml $variables -}}
{{- end -}}
