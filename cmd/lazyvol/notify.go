package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	systemd "github.com/coreos/go-systemd/v22/daemon"

	"github.com/lazyvol/lazyvol/fs"
)

// statusInterval is how often the supervisor's status line is brought up to date if no
// watchdog sets the pace.
const statusInterval = 30 * time.Second

// A notifier tells the supervisor that started the daemon, such as systemd, how
// it is: see sd_notify(3). The zero notifier tells nobody.
type notifier struct {
	send     func(state string) error // nil: there is nobody
	watchdog time.Duration            // how often it wants to hear; 0: it does not
	last     string                   // status line
	log      *slog.Logger
}

// newNotifier returns the notifier of a daemon. One in the background has no supervisor:
// what its environment names supervises who started it.
func newNotifier(background bool, log *slog.Logger) *notifier {
	if background || os.Getenv("NOTIFY_SOCKET") == "" {
		return &notifier{log: log}
	}
	n := &notifier{log: log, send: func(state string) error {
		_, err := systemd.SdNotify(false, state)
		return err
	}}
	var err error
	if n.watchdog, err = systemd.SdWatchdogEnabled(false); err != nil {
		log.Error("the watchdog is not answered", "error", err)
	}
	return n
}

// tell sends lines such as READY=1. It only fails if the supervisor has gone.
func (n *notifier) tell(lines ...string) {
	if n.send == nil {
		return
	}
	if err := n.send(strings.Join(lines, "\n")); err != nil {
		n.log.Error("could not notify the supervisor", "error", err)
	}
}

// ready tells that the daemon can be used, and what it is.
func (n *notifier) ready(status string) {
	n.last = status
	n.tell(systemd.SdNotifyReady, fmt.Sprintf("MAINPID=%d", os.Getpid()), "STATUS="+status)
}

// stopping tells that the daemon ends, and what it waits for.
func (n *notifier) stopping(status string) {
	n.tell(systemd.SdNotifyStopping, "STATUS="+status)
}

// keepTelling tells that the daemon serves, twice in each interval of the watchdog, and
// keeps its status up to date, until ctx ends. alive returns when it has
// proved that it serves; as long as it does not, nothing is told, so that the
// supervisor starts the daemon anew.
func (n *notifier) keepTelling(ctx context.Context, alive func(context.Context) error, status func() string) {
	if n.send == nil {
		return
	}
	pause := statusInterval
	if n.watchdog > 0 {
		pause = n.watchdog / 2
	}
	tick := time.NewTicker(pause)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		var lines []string
		if n.watchdog > 0 {
			switch err := alive(ctx); {
			case err == nil:
				lines = append(lines, systemd.SdNotifyWatchdog)
			case ctx.Err() == nil:
				n.log.Error("not serving, and so the watchdog is not told otherwise", "error", err)
			}
		}
		if s := status(); s != n.last {
			n.last = s
			lines = append(lines, "STATUS="+s)
		}
		if len(lines) > 0 && ctx.Err() == nil {
			n.tell(lines...)
		}
	}
}

// alive returns nil when the daemon has served a request on each of its ways in: the
// control socket, and the mount, through the kernel. It asks for the status, which
// neither waits for the store nor for the disk, and looks at what all reads and writes
// go through. It does not return while the daemon hangs.
func (d *daemon) alive(ctx context.Context) error {
	if _, err := askStatus(ctx, d.dir); err != nil {
		return err
	}
	err := readByOther(ctx, filepath.Join(d.mountpoint, fs.StatusName))
	if err == nil {
		return nil
	}
	on, _, look := fs.MountedOn(d.mountpoint)
	if errors.Is(look, os.ErrNotExist) || look == nil && on.ID() != d.id { // out of sight
		return nil
	}
	return fmt.Errorf("read the status: %w", err)
}

// readByOther has another process read a file of our own mount. A thread of ours that
// waited for our own answer could not be killed, and we not be started anew: the kernel
// gives a mount up only when its daemon is gone with all threads.
func readByOther(ctx context.Context, file string) error {
	c := exec.CommandContext(ctx, "head", "-c", "1", file)
	if said, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, bytes.TrimSpace(said))
	}
	return nil
}

// statusLine is the daemon in one line, for its supervisor.
func (d *daemon) statusLine() string {
	s := d.status()
	line := fmt.Sprintf("%s on %s: %s", s.ID, d.shownAs, s.State)
	if s.TotalBytes > 0 {
		line += fmt.Sprintf(", %d %% of %s on this host", s.HydratedBytes*100/s.TotalBytes, size(s.TotalBytes))
	}
	if s.DirtyBytes > 0 {
		line += fmt.Sprintf(", %s in no snapshot", size(s.DirtyBytes))
	}
	return line
}
