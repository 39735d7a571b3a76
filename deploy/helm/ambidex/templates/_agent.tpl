{{/* What the agent, and an undo in its place, may do and see; the argument is a list of the root, the settings, and whether it
is the agent. */}}
{{- define "ambidex.agentBody" -}}
{{- $root := index . 0 -}}
{{- $settings := index . 1 -}}
env:
  - name: RUST_LOG
    value: {{ $root.Values.agent.logLevel }}
  - name: AMBIDEX_RUN_DIR
    value: {{ $root.Values.runDir }}
  - name: AMBIDEX_STATE_DIR
    value: {{ $root.Values.stateDir }}
  {{- with $root.Values.agent.iptables }}
  - name: AMBIDEX_IPTABLES
    value: {{ . }}
  {{- end }}
  {{- if $settings.usesNode }}
  # A container's own /proc/sys is read-only.
  - name: AMBIDEX_PROC_SYS
    value: /host/sysctl
  {{- end }}
  {{- if index . 2 }}
  {{- if not $root.Values.teardown }}
  # Labels say which pods are captured.
  - name: AMBIDEX_SOURCE
    value: kubernetes
  - name: NODE_NAME
    valueFrom:
      fieldRef: {fieldPath: spec.nodeName}
  - name: POD_NAME
    valueFrom:
      fieldRef: {fieldPath: metadata.name}
  - name: POD_NAMESPACE
    valueFrom:
      fieldRef: {fieldPath: metadata.namespace}
  - name: EXCLUDE_NAMESPACES
    value: {{ join "," $root.Values.cni.excludeNamespaces | quote }}
  {{- end }}
  {{- with $root.Values.agent.env }}
  {{- include "ambidex.env" . | nindent 2 }}
  {{- end }}
  {{- end }}
securityContext:
  runAsUser: 0
  readOnlyRootFilesystem: true
  # SYS_ADMIN implies it.
  allowPrivilegeEscalation: true
  capabilities:
    drop: [ALL]
    add:
      # Rules, routes, devices, sets and sysctls.
      - NET_ADMIN
      # iptables speaks to the kernel through a raw socket where it is the legacy one.
      - NET_RAW
      # Entering network namespaces.
      - SYS_ADMIN
      # Finding the network namespaces of pods that run already through their processes.
      - SYS_PTRACE
volumeMounts:
  - {name: run, mountPath: {{ $root.Values.runDir }}}
  - {name: state, mountPath: {{ $root.Values.stateDir }}}
  # At the path that the container runtime names; namespaces of pods that come later appear in it.
  - {name: netns, mountPath: {{ $settings.netnsDir }}, mountPropagation: HostToContainer}
  - {name: xtables-lock, mountPath: /run/xtables.lock}
  - {name: host-proc, mountPath: /host/proc, readOnly: true}
  {{- if $settings.usesNode }}
  - {name: host-sysctls, mountPath: /host/sysctl/net}
  {{- end }}
  - {name: tmp, mountPath: /tmp}
{{- end -}}

{{/* The installer writes files that belong to root and asks for nothing else. */}}
{{- define "ambidex.installerSecurity" -}}
securityContext:
  runAsUser: 0
  readOnlyRootFilesystem: true
  allowPrivilegeEscalation: false
  capabilities:
    drop: [ALL]
{{- end -}}
