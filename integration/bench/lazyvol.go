package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strings"
	"syscall"
	"time"
)

// A host is a machine as lazyvol sees it: a state directory, new and empty, and
// a store, at an endpoint with latency or without.
type host struct {
	b      *bench
	dir    string
	env    []string
	mounts int
}

func (b *bench) newHost(endpoint string) (*host, error) {
	dir, err := b.folder("host")
	if err != nil {
		return nil, err
	}
	env := append(b.server.env(endpoint), "PATH="+os.Getenv("PATH"), "HOME="+dir,
		"LAZYVOL_STATE="+filepath.Join(dir, "state"), "LAZYVOL_STORE=s3://"+storeBucket+"/"+storePrefix)
	return &host{b: b, dir: dir, env: env}, nil
}

// farHost returns a host that sees the latency.
func (b *bench) farHost() (*host, error) { return b.newHost(b.server.far) }

// run runs a command to its end and returns what it printed.
func (h *host) run(ctx context.Context, args ...string) (string, error) {
	out, _, err := h.runMeasured(ctx, args...)
	return out, err
}

// usage is what a command took.
type usage struct {
	wall time.Duration
	cpu  time.Duration
	peak int64 // resident bytes
}

func (h *host) runMeasured(ctx context.Context, args ...string) (string, usage, error) {
	ctx, cancel := context.WithTimeout(ctx, commandPatience)
	defer cancel()
	cmd := exec.CommandContext(ctx, h.b.lazyvol, args...)
	cmd.Dir, cmd.Env, cmd.WaitDelay = h.dir, h.env, endPatience
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	// The kernel counts the memory of whoever starts a process as the process's own
	// before it executes its program: let that be little, and not the most that we
	// ever needed.
	debug.FreeOSMemory()
	if err := os.WriteFile("/proc/self/clear_refs", []byte("5"), 0); err != nil {
		return "", usage{}, err
	}
	begin := time.Now()
	if err := cmd.Run(); err != nil {
		return "", usage{}, fmt.Errorf("lazyvol %s: %w: %s", strings.Join(args, " "), err, tail(stderr.Bytes()))
	}
	u := usage{wall: time.Since(begin), cpu: cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()}
	if r, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage); ok {
		u.peak = r.Maxrss << 10
	}
	return strings.TrimSpace(stdout.String()), u, nil
}

// An lvMount is a mount and its daemon.
type lvMount struct {
	host  *host
	id    string // of the volume or snapshot
	dir   string
	image string
	pid   int
	stop  func()
}

// status is what of status.json is of interest.
type status struct {
	State         string  `json:"state"`
	PID           int     `json:"pid"`
	Mountpoint    string  `json:"mountpoint"`
	HydratedBytes int64   `json:"hydratedBytes"`
	DemandFetches int64   `json:"demandFetches"`
	FetchedBytes  int64   `json:"fetchedBytes"`
	DemandWaits   int64   `json:"demandWaits"`
	DemandWait    float64 `json:"demandWaitSeconds"`
}

// newVolume makes a volume of the image.
func (h *host) newVolume(ctx context.Context) (string, error) {
	return h.run(ctx, "volume", "create", "--snapshot", h.b.snap)
}

// mount mounts a volume or snapshot until stop, or the end of the run.
func (h *host) mount(ctx context.Context, id string, flags ...string) (*lvMount, error) {
	h.mounts++
	dir := filepath.Join(h.dir, fmt.Sprintf("mnt-%d", h.mounts))
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, err
	}
	if _, err := h.run(ctx, append(append([]string{"mount"}, flags...), id, dir)...); err != nil {
		return nil, err
	}
	return h.mounted(id, dir, func(ctx context.Context) error {
		_, err := h.run(ctx, "unmount", dir)
		return err
	})
}

// mounted wraps up what a command has mounted; remove takes it away again.
func (h *host) mounted(id, dir string, remove func(context.Context) error) (*lvMount, error) {
	m := &lvMount{host: h, id: id, dir: dir, image: filepath.Join(dir, "volume.img")}
	m.stop = once(func() {
		// The run may be interrupted, and this has to happen all the same.
		ctx, cancel := context.WithTimeout(context.Background(), startPatience)
		defer cancel()
		if err := remove(ctx); err != nil {
			h.b.say("%v", err)
			unmount(dir)
		}
	})
	h.b.later(m.stop)
	s, err := m.status()
	if err != nil {
		m.stop()
		return nil, err
	}
	m.pid = s.PID
	return m, nil
}

func (m *lvMount) status() (s status, err error) {
	data, err := os.ReadFile(filepath.Join(m.dir, "status.json"))
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal(data, &s)
}

// mount makes a mount until the row, or in a set-up the group, ends.
func (r *turn) mount(ctx context.Context, h *host, id string, flags ...string) (*lvMount, error) {
	m, err := h.mount(ctx, id, flags...)
	if err == nil {
		r.own(m)
	}
	return m, err
}

// own stops a mount when the row ends, if not before, and notes then what
// memory the daemon needed.
func (r *turn) own(m *lvMount) {
	row, stop := r.row, m.stop
	m.stop = once(func() {
		if err := r.recordMemory(row, m); err != nil {
			r.fail(row, err)
		}
		stop()
	})
	r.atEnd(m.stop)
}

// volume makes a host, a volume of the image on it, and mounts it.
func (r *turn) volume(ctx context.Context, flags ...string) (*lvMount, error) {
	h, err := r.farHost()
	if err != nil {
		return nil, err
	}
	id, err := h.newVolume(ctx)
	if err != nil {
		return nil, err
	}
	return r.mount(ctx, h, id, flags...)
}

// memory is the metric of the most memory that a daemon had resident, in MiB.
const memory = "memory MiB"

// recordMemory notes the most memory that a daemon needed since it began, or
// since forgetMemory.
func (r *turn) recordMemory(row string, m *lvMount) error {
	kib, err := procValue(m.pid, "status", "VmHWM")
	if err != nil {
		return fmt.Errorf("the daemon of %s is gone: %w", m.dir, err)
	}
	r.figures.add(key{row, lazyvolName, memory}, float64(kib)/1024)
	return nil
}

// forgetMemory begins a new maximum: 5 means that in clear_refs.
func (m *lvMount) forgetMemory() error {
	return os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", m.pid), []byte("5"), 0)
}

// lazyvol is a volume, without hydration, beside the peers.
type lazyvol struct{ b *bench }

func (*lazyvol) name() string { return lazyvolName }

func (s *lazyvol) prepare(context.Context) error {
	if _, err := os.Stat(s.b.options.lazyvol); err != nil {
		return fmt.Errorf("%w (make build)", err)
	}
	return nil
}

func (s *lazyvol) start(ctx context.Context) (member, error) {
	h, err := s.b.farHost()
	if err != nil {
		return member{}, err
	}
	id, err := h.newVolume(ctx)
	if err != nil {
		return member{}, err
	}
	m, err := h.mount(ctx, id, "--no-hydrate")
	if err != nil {
		return member{}, err
	}
	return member{system: s, path: m.image, mount: m, stop: m.stop}, nil
}
