package main

import (
	"crypto/tls"
	"crypto/x509"
	"testing"
)

func TestAServersCertificateIsGoodForItsNamesAlone(t *testing.T) {
	a, err := newAuthority()
	if err != nil {
		t.Fatal(err)
	}
	server, err := a.issue("system:node:node-a", "system:nodes", "node-a", "10.77.0.11")
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(server.certificate, server.key)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(a.pem)
	for name, good := range map[string]bool{"node-a": true, "10.77.0.11": true, "node-b": false, "10.77.0.12": false} {
		_, err := pair.Leaf.Verify(x509.VerifyOptions{DNSName: name, Roots: roots})
		if (err == nil) != good {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestAUsersCertificateIsNoServers(t *testing.T) {
	a, err := newAuthority()
	if err != nil {
		t.Fatal(err)
	}
	user, err := a.issue("testcluster-admin", "system:masters")
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(user.certificate, user.key)
	if err != nil {
		t.Fatal(err)
	}
	if len(pair.Leaf.ExtKeyUsage) != 1 || pair.Leaf.ExtKeyUsage[0] != x509.ExtKeyUsageClientAuth {
		t.Errorf("it is for %v", pair.Leaf.ExtKeyUsage)
	}
	if got := pair.Leaf.Subject.Organization; len(got) != 1 || got[0] != "system:masters" {
		t.Errorf("its groups are %v", got)
	}
}
