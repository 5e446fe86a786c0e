package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// A system serves the image as one file.
type system interface {
	name() string

	// prepare is called once: the system sees whether it is installed, which it
	// is not if the error is a missingError, and stores the image as it wants it.
	prepare(ctx context.Context) error

	// start serves the image with nothing of it cached, until the turn ends
	// or stop is called. It returns when the file is there.
	start(ctx context.Context) (member, error)
}

// A member is a system that runs.
type member struct {
	system  system
	path    string        // of the file
	mount   *lvMount      // lazyvol's
	copying time.Duration // of its start was spent on copies that only the bench needs
	stop    func()
}

// pid is lazyvol's daemon, 0 for others.
func (m member) pid() int {
	if m.mount == nil {
		return 0
	}
	return m.mount.pid
}

// A missingError says why a system is not measured.
type missingError struct{ error }

// The systems' names.
const (
	lazyvolName  = "lazyvol"
	rawName      = "raw"
	qemuFileName = "qemu-file"
	s3backerName = "s3backer"
	qemuHTTPName = "qemu-http"
	rcloneName   = "rclone"
	nbdkitName   = "nbdkit"
)

// peers are the systems that do what lazyvol does; the raw file and qemu's
// export of a local file are limits.
var peers = []string{s3backerName, qemuHTTPName, rcloneName, nbdkitName}

func allSystems(b *bench) []system {
	return []system{
		&lazyvol{b: b}, &raw{b: b}, &qemuFile{b: b}, &s3backer{b: b}, &qemuHTTP{b: b}, &rclone{b: b}, &nbdkit{b: b},
	}
}

// lazy reports whether a system fetches what is read.
func lazy(s system) bool { return s.name() != rawName && s.name() != qemuFileName }

// cold starts a system for the time of a row.
func (r *turn) cold(ctx context.Context, s system) (member, error) {
	m, err := s.start(ctx)
	switch {
	case err != nil:
	case m.mount != nil:
		r.own(m.mount)
		m.stop = m.mount.stop
	default:
		r.atEnd(m.stop)
	}
	return m, err
}

// once makes a function that does something the first time only.
func once(fn func()) func() {
	done := false
	return func() {
		if !done {
			done = true
			fn()
		}
	}
}

// serve starts a foreground process that shows the image as a file, and waits
// for the file. The mount, if dir is not "", goes before the process does.
func (b *bench) serve(ctx context.Context, s system, path, dir string, env []string, binary string, args ...string) (member, error) {
	p, err := startProcess(b.dir, s.name(), env, binary, args...)
	if err != nil {
		return member{}, err
	}
	stop := once(func() {
		if dir != "" {
			unmount(dir)
		}
		p.stop()
	})
	b.later(stop)
	err = p.await(ctx, s.name()+" shows the image", func() bool {
		info, err := os.Stat(path)
		return err == nil && info.Size() == b.image.size
	})
	if err != nil {
		stop()
	}
	return member{system: s, path: path, stop: stop}, err
}

// raw is the file itself.
type raw struct{ b *bench }

func (*raw) name() string                  { return rawName }
func (*raw) prepare(context.Context) error { return nil }
func (s *raw) start(ctx context.Context) (member, error) {
	path, err := s.b.copyOfImage(ctx, rawName)
	return member{system: s, path: path, stop: once(func() { _ = os.Remove(path) })}, err
}

// copyOfImage copies the image into a file of its own.
func (b *bench) copyOfImage(ctx context.Context, name string) (string, error) {
	dir, err := b.folder(name)
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "disk.img")
	return path, copySparse(ctx, path, b.image.path)
}

// need looks for programs.
func (b *bench) need(names ...string) error {
	for _, name := range names {
		if _, err := b.tool(name); err != nil {
			return &missingError{err}
		}
	}
	return nil
}

// url is the raw image's, with latency.
func (s *server) url() string { return fmt.Sprintf("%s/%s/%s", s.far, rawBucket, rawKey) }
