package main

import (
	"fmt"
	"net"
	"strconv"
)

var apiServer = "https://" + net.JoinHostPort(controlAddress, strconv.Itoa(apiPort))

// writeIdentities makes all keys, and puts into each machine's folder those that it needs and no others.
func (c *cluster) writeIdentities() error {
	a, err := newAuthority()
	if err != nil {
		return err
	}
	control, err := controlFiles(a)
	if err != nil {
		return err
	}
	if err := writeFiles(c.path(machines[0].Name, "config"), 0o600, control); err != nil {
		return err
	}
	for _, m := range nodes() {
		files, err := nodeFiles(a, m)
		if err != nil {
			return err
		}
		if err := writeFiles(c.path(m.Name, "config"), 0o600, files); err != nil {
			return err
		}
	}
	admin, err := a.issue("testcluster-admin", "system:masters")
	if err != nil {
		return err
	}
	return writeFiles(c.State, 0o600, map[string][]byte{
		"kubeconfig": kubeconfig(a, "https://"+net.JoinHostPort("127.0.0.1", strconv.Itoa(c.APIPort)), admin),
	})
}

func controlFiles(a *authority) (map[string][]byte, error) {
	authorityKey, err := encodeKey(a.key)
	if err != nil {
		return nil, err
	}
	private, public, err := serviceAccountKeys()
	if err != nil {
		return nil, err
	}
	server, err := a.issue("kube-apiserver", "system:masters", "kubernetes", "kubernetes.default", "kubernetes.default.svc",
		"kubernetes.default.svc.cluster.local", "localhost", "127.0.0.1", controlAddress, serviceAddress)
	if err != nil {
		return nil, err
	}
	files := map[string][]byte{
		"ca.crt": a.pem, "ca.key": authorityKey, "sa.key": private, "sa.pub": public,
		"apiserver.crt": server.certificate, "apiserver.key": server.key,
	}
	for _, user := range []string{"kube-controller-manager", "kube-scheduler"} {
		own, err := a.issue("system:"+user, "")
		if err != nil {
			return nil, err
		}
		files[user+".conf"] = kubeconfig(a, apiServer, own)
	}
	return files, nil
}

func nodeFiles(a *authority, m machine) (map[string][]byte, error) {
	node, err := a.issue("system:node:"+m.Name, "system:nodes", m.Name, m.Address, "127.0.0.1")
	if err != nil {
		return nil, err
	}
	proxy, err := a.issue("system:kube-proxy", "")
	if err != nil {
		return nil, err
	}
	return map[string][]byte{
		"ca.crt": a.pem, "kubelet.crt": node.certificate, "kubelet.key": node.key,
		"kubelet.conf": kubeconfig(a, apiServer, node), "kube-proxy.conf": kubeconfig(a, apiServer, proxy),
		"kubelet.yaml": kubeletConfig(), "kube-proxy.yaml": proxyConfig(m),
	}, nil
}

func program(name string, arguments ...string) []string {
	return append([]string{"/usr/local/bin/kubernetes", name}, arguments...)
}

// controlServices in the order in which they are started.
func controlServices() []namedService {
	at := func(file string) string { return machineConfig + "/" + file }
	own := func(name string) []string {
		config := at(name + ".conf")
		return []string{"--kubeconfig=" + config, "--authentication-kubeconfig=" + config, "--authorization-kubeconfig=" + config,
			"--leader-elect=false"}
	}
	return []namedService{
		{"etcd", []string{"/usr/bin/etcd", "--data-dir=/var/lib/containerd/etcd", "--listen-client-urls=http://127.0.0.1:2379",
			"--advertise-client-urls=http://127.0.0.1:2379", "--listen-peer-urls=http://127.0.0.1:2380", "--log-level=warn",
			"--unsafe-no-fsync"}},
		{"kube-apiserver", program("kube-apiserver", "--advertise-address="+controlAddress, "--bind-address=0.0.0.0",
			fmt.Sprintf("--secure-port=%d", apiPort), "--etcd-servers=http://127.0.0.1:2379",
			"--service-cluster-ip-range="+serviceNetwork, "--authorization-mode=Node,RBAC",
			"--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
			"--client-ca-file="+at("ca.crt"), "--tls-cert-file="+at("apiserver.crt"), "--tls-private-key-file="+at("apiserver.key"),
			"--service-account-issuer=https://kubernetes.default.svc.cluster.local", "--service-account-key-file="+at("sa.pub"),
			"--service-account-signing-key-file="+at("sa.key"), "--kubelet-certificate-authority="+at("ca.crt"),
			"--kubelet-client-certificate="+at("apiserver.crt"), "--kubelet-client-key="+at("apiserver.key"),
			"--kubelet-preferred-address-types=InternalIP",
			// There is no kube-proxy beside the API server: it reaches webhooks at their pods' addresses.
			"--enable-aggregator-routing=true")},
		{"kube-controller-manager", program("kube-controller-manager", append(own("kube-controller-manager"),
			"--root-ca-file="+at("ca.crt"), "--service-account-private-key-file="+at("sa.key"),
			"--use-service-account-credentials=true", "--cluster-signing-cert-file="+at("ca.crt"),
			"--cluster-signing-key-file="+at("ca.key"))...)},
		{"kube-scheduler", program("kube-scheduler", own("kube-scheduler")...)},
	}
}

// nodeServices in the order in which they are started.
func nodeServices(m machine) []namedService {
	return []namedService{
		{"containerd", []string{"/usr/bin/containerd", "--config=/etc/containerd/config.toml"}},
		{"kubelet", program("kubelet", "--config="+machineConfig+"/kubelet.yaml", "--kubeconfig="+machineConfig+"/kubelet.conf",
			"--hostname-override="+m.Name, "--node-ip="+m.Address, "--v=2")},
		{"kube-proxy", program("kube-proxy", "--config="+machineConfig+"/kube-proxy.yaml", "--v=2")},
	}
}

type namedService struct {
	name string
	argv []string
}
