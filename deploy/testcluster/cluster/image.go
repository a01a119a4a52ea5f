package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// descriptor points at a blob of an OCI image layout.
type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int64             `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

// runImage packs a root filesystem as an OCI archive of one layer. The same files give the same archive.
// With --volume PATH it declares a volume, as VOLUME in a Dockerfile does.
func runImage(arguments []string) error {
	volumes := map[string]struct{}{}
	for len(arguments) > 1 && arguments[0] == "--volume" {
		volumes[arguments[1]] = struct{}{}
		arguments = arguments[2:]
	}
	if len(arguments) < 3 {
		return errors.New("usage: testcluster image [--volume PATH]... NAME:TAG ROOTFS ARCHIVE [ENTRYPOINT...]")
	}
	name, root, archive, entrypoint := arguments[0], arguments[1], arguments[2], arguments[3:]
	layer, err := os.CreateTemp(filepath.Dir(archive), ".layer-*")
	if err != nil {
		return err
	}
	defer os.Remove(layer.Name())
	defer layer.Close()
	described, err := packLayer(root, layer)
	if err != nil {
		return fmt.Errorf("packing %s: %w", root, err)
	}
	made, err := os.CreateTemp(filepath.Dir(archive), ".image-*")
	if err != nil {
		return err
	}
	defer os.Remove(made.Name())
	defer made.Close()
	if err := writeLayout(made, name, layer, described, entrypoint, volumes); err != nil {
		return fmt.Errorf("writing %s: %w", archive, err)
	}
	if err := made.Chmod(0o644); err != nil {
		return err
	}
	return os.Rename(made.Name(), archive)
}

// packLayer writes all below root, owners and all but times and extended attributes.
func packLayer(root string, to io.Writer) (descriptor, error) {
	sum, size := sha256.New(), &counter{}
	packed := tar.NewWriter(io.MultiWriter(to, sum, size))
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || path == root {
			return err
		}
		return packEntry(packed, root, path, entry)
	})
	if err := errors.Join(err, packed.Close()); err != nil {
		return descriptor{}, err
	}
	return descriptor{"application/vnd.oci.image.layer.v1.tar", "sha256:" + hex.EncodeToString(sum.Sum(nil)), size.n, nil}, nil
}

func packEntry(packed *tar.Writer, root, path string, entry fs.DirEntry) error {
	info, err := entry.Info()
	if err != nil {
		return err
	}
	target := ""
	if info.Mode()&fs.ModeSymlink != 0 {
		if target, err = os.Readlink(path); err != nil {
			return err
		}
	}
	header, err := tar.FileInfoHeader(info, target)
	if err != nil {
		return err
	}
	if header.Name, err = filepath.Rel(root, path); err != nil {
		return err
	}
	if info.IsDir() {
		header.Name += "/"
	}
	if owner, ok := info.Sys().(*syscall.Stat_t); ok {
		header.Uid, header.Gid = int(owner.Uid), int(owner.Gid)
	}
	header.Uname, header.Gname, header.Format = "", "", tar.FormatPAX
	header.ModTime, header.AccessTime, header.ChangeTime = epoch, epoch, epoch
	if err := packed.WriteHeader(header); err != nil || !info.Mode().IsRegular() {
		return err
	}
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	_, err = io.Copy(packed, file)
	return err
}

func writeLayout(to io.Writer, name string, layer io.ReadSeeker, described descriptor, entrypoint []string, volumes map[string]struct{}) error {
	if _, err := layer.Seek(0, io.SeekStart); err != nil {
		return err
	}
	settings := map[string]any{"Entrypoint": entrypoint, "Env": []string{"PATH=/usr/local/bin:/usr/bin:/bin"}}
	if len(volumes) > 0 {
		settings["Volumes"] = volumes
	}
	config, err := json.Marshal(map[string]any{
		"architecture": runtime.GOARCH, "os": "linux",
		"config": settings,
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{described.Digest}},
	})
	if err != nil {
		return err
	}
	manifest, err := json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
		"config": describe("application/vnd.oci.image.config.v1+json", config), "layers": []descriptor{described},
	})
	if err != nil {
		return err
	}
	entry := describe("application/vnd.oci.image.manifest.v1+json", manifest)
	entry.Annotations = map[string]string{"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name}
	index, err := json.Marshal(map[string]any{"schemaVersion": 2, "manifests": []descriptor{entry}})
	if err != nil {
		return err
	}
	packed := tar.NewWriter(to)
	for _, part := range []struct {
		name    string
		content io.Reader
		size    int64
	}{
		{"oci-layout", strings.NewReader(layoutVersion), int64(len(layoutVersion))},
		{"index.json", bytes.NewReader(index), int64(len(index))},
		{blob(entry.Digest), bytes.NewReader(manifest), int64(len(manifest))},
		{blob(describe("", config).Digest), bytes.NewReader(config), int64(len(config))},
		{blob(described.Digest), layer, described.Size},
	} {
		header := &tar.Header{Name: part.name, Size: part.size, Mode: 0o644, Typeflag: tar.TypeReg, ModTime: epoch}
		if err := packed.WriteHeader(header); err != nil {
			return err
		}
		if _, err := io.Copy(packed, part.content); err != nil {
			return err
		}
	}
	return packed.Close()
}

// epoch is the time of all files in an image.
var epoch = time.Unix(0, 0)

const layoutVersion = `{"imageLayoutVersion":"1.0.0"}`

func describe(kind string, content []byte) descriptor {
	sum := sha256.Sum256(content)
	return descriptor{kind, "sha256:" + hex.EncodeToString(sum[:]), int64(len(content)), nil}
}

func blob(digest string) string { return "blobs/" + strings.Replace(digest, ":", "/", 1) }

type counter struct{ n int64 }

func (c *counter) Write(part []byte) (int, error) {
	c.n += int64(len(part))
	return len(part), nil
}

func copyFile(from, to string) error {
	source, err := os.Open(from)
	if err != nil {
		return err
	}
	defer source.Close()
	target, err := os.Create(to)
	if err != nil {
		return err
	}
	_, err = io.Copy(target, source)
	return errors.Join(err, target.Close())
}
