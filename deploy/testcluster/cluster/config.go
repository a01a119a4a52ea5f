package main

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
)

const (
	stockRuntime = "/usr/sbin/runc"
	pauseImage   = "podferry.test/pause:1"
	// Annotations of pods that containerd puts into the config.json of each of their containers.
	passedAnnotations = "podferry.dev/*"
)

// document is a configuration file in JSON, which is YAML too.
type document map[string]any

func (d document) bytes() []byte {
	content, err := json.MarshalIndent(d, "", "  ")
	if err != nil {
		panic(err) // only maps, lists, strings, numbers
	}
	return append(content, '\n')
}

func kubeconfig(a *authority, server string, user identity) []byte {
	text := base64.StdEncoding.EncodeToString
	return document{
		"apiVersion": "v1", "kind": "Config", "current-context": "testcluster",
		"clusters": []any{document{"name": "testcluster", "cluster": document{
			"server": server, "certificate-authority-data": text(a.pem)}}},
		"users": []any{document{"name": "testcluster", "user": document{
			"client-certificate-data": text(user.certificate), "client-key-data": text(user.key)}}},
		"contexts": []any{document{"name": "testcluster", "context": document{
			"cluster": "testcluster", "user": "testcluster"}}},
	}.bytes()
}

// kubeletConfig is an ordinary node's but for what this kind of host needs: no swap check, cgroup v1 allowed, no change of
// the OOM score (which takes CAP_SYS_RESOURCE), and no eviction when the host's disk is full.
func kubeletConfig() []byte {
	return document{
		"apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
		"authentication": document{"anonymous": document{"enabled": false}, "webhook": document{"enabled": true},
			"x509": document{"clientCAFile": machineConfig + "/ca.crt"}},
		"authorization":            document{"mode": "Webhook"},
		"tlsCertFile":              machineConfig + "/kubelet.crt",
		"tlsPrivateKeyFile":        machineConfig + "/kubelet.key",
		"containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
		"clusterDNS":               []string{dnsAddress}, "clusterDomain": "cluster.local",
		"cgroupDriver": "cgroupfs", "failCgroupV1": false, "failSwapOn": false, "oomScoreAdj": 0,
		"resolvConf": "/etc/resolv.conf",
		"evictionHard": document{"imagefs.available": "0%", "nodefs.available": "0%", "nodefs.inodesFree": "0%",
			"memory.available": "100Mi"},
		"imageGCHighThresholdPercent": 100, "imageGCLowThresholdPercent": 99,
		"imagePullCredentialsVerificationPolicy": "NeverVerify",
		"nodeStatusUpdateFrequency":              "5s", "shutdownGracePeriod": "0s",
		"makeIPTablesUtilChains": false,
	}.bytes()
}

// proxyConfig leaves conntrack's sizes alone: they are the whole host's.
func proxyConfig(m machine) []byte {
	return document{
		"apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
		"clientConnection": document{"kubeconfig": machineConfig + "/kube-proxy.conf"},
		"clusterCIDR":      podNetwork, "hostnameOverride": m.Name, "mode": "nftables", "oomScoreAdj": 0,
		"conntrack": document{"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
	}.bytes()
}

func cniConfig(m machine) []byte {
	return document{
		"cniVersion": "1.0.0", "name": "testcluster",
		"plugins": []any{
			document{"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false, "hairpinMode": true,
				"ipam": document{"type": "host-local", "routes": []any{document{"dst": "0.0.0.0/0"}},
					"ranges": []any{[]any{document{"subnet": m.Pods}}}}},
			document{"type": "portmap", "backend": "nftables", "capabilities": document{"portMappings": true}},
		},
	}.bytes()
}

// containerdConfig names what is not containerd's default here. Handlers other than runc come from drop-ins, as an installer
// makes them.
func containerdConfig() []byte {
	return []byte(`version = 3
oom_score = 0
imports = ["/etc/containerd/conf.d/*.toml"]
disabled_plugins = ["io.containerd.internal.v1.tracing", "io.containerd.tracing.processor.v1.otlp", "io.containerd.nri.v1.nri"]

[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "` + pauseImage + `"

[plugins."io.containerd.cri.v1.runtime"]
  # Without CAP_SYS_RESOURCE no process may be given a lower OOM score than its parent's.
  restrict_oom_score_adj = true
  disable_apparmor = true
  enable_cdi = false
  [plugins."io.containerd.cri.v1.runtime".containerd]
    default_runtime_name = "runc"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
        SystemdCgroup = false
        BinaryName = "` + stockRuntime + `"
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["/usr/lib/cni"]
    conf_dir = "/etc/cni/net.d"
`)
}

// handlerConfig is the drop-in for the handler podferry.
func handlerConfig(runtime string) []byte {
	return []byte(`version = 3

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.podferry]
  runtime_type = "io.containerd.runc.v2"
  pod_annotations = ["` + passedAnnotations + `"]
  container_annotations = ["` + passedAnnotations + `"]
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.podferry.options]
    SystemdCgroup = false
    BinaryName = "` + runtime + `"
`)
}

// runtimeClass makes the handler known to the cluster.
func runtimeClass() []byte {
	return document{"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "handler": "podferry",
		"metadata": document{"name": "podferry"}}.bytes()
}

func hostsFile() []byte {
	var lines strings.Builder
	lines.WriteString("127.0.0.1 localhost\n::1 localhost\n")
	for _, m := range machines {
		fmt.Fprintf(&lines, "%s %s\n", m.Address, m.Name)
	}
	return []byte(lines.String())
}
