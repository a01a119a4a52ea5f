package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
)

// pack makes a small image and returns the files of its archive by name.
func pack(t *testing.T, archive string) map[string][]byte {
	t.Helper()
	root := t.TempDir()
	if err := os.MkdirAll(filepath.Join(root, "usr/bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "usr/bin/app"), []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("usr/bin", filepath.Join(root, "bin")); err != nil {
		t.Fatal(err)
	}
	if err := runImage([]string{"podferry.test/app:1", root, archive, "/bin/app"}); err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(archive)
	if err != nil {
		t.Fatal(err)
	}
	return unpack(t, content)
}

func unpack(t *testing.T, content []byte) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	for packed := tar.NewReader(bytes.NewReader(content)); ; {
		header, err := packed.Next()
		if errors.Is(err, io.EOF) {
			return files
		} else if err != nil {
			t.Fatal(err)
		}
		if files[header.Name], err = io.ReadAll(packed); err != nil {
			t.Fatal(err)
		}
	}
}

func TestAnImageLeadsFromItsNameToItsFiles(t *testing.T) {
	files := pack(t, filepath.Join(t.TempDir(), "image.tar"))
	var index struct{ Manifests []descriptor }
	var manifest struct {
		Config descriptor
		Layers []descriptor
	}
	if err := json.Unmarshal(files["index.json"], &index); err != nil {
		t.Fatal(err)
	}
	if got := index.Manifests[0].Annotations["io.containerd.image.name"]; got != "podferry.test/app:1" {
		t.Errorf("the image is called %q", got)
	}
	if err := json.Unmarshal(files[blob(index.Manifests[0].Digest)], &manifest); err != nil {
		t.Fatal(err)
	}
	for _, part := range append(manifest.Layers, manifest.Config, index.Manifests[0]) {
		content := files[blob(part.Digest)]
		if got := describe(part.MediaType, content); got.Digest != part.Digest || got.Size != part.Size {
			t.Errorf("%s is described as %+v and is %+v", part.MediaType, part, got)
		}
	}
	layer := unpack(t, files[blob(manifest.Layers[0].Digest)])
	if string(layer["usr/bin/app"]) != "#!/bin/sh\n" {
		t.Errorf("the layer holds %q", layer)
	}
}

func TestTheSameFilesMakeTheSameImage(t *testing.T) {
	first, second := pack(t, filepath.Join(t.TempDir(), "a.tar")), pack(t, filepath.Join(t.TempDir(), "b.tar"))
	if !bytes.Equal(first["index.json"], second["index.json"]) {
		t.Errorf("%s\n%s", first["index.json"], second["index.json"])
	}
}
