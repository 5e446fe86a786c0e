package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// controlName is the socket in a volume's or session's folder on which its
// daemon takes requests of other commands: HTTP with JSON bodies.
const controlName = "control"

// errNoDaemon: nobody serves a control socket.
var errNoDaemon = errors.New("no daemon is running")

// socketPath returns a short path to a file in dir: a socket's path is limited
// to 108 bytes, and a state directory's is not. The path holds as long as the
// folder is open.
func socketPath(dir *os.File) string {
	return filepath.Join("/proc/self/fd", strconv.Itoa(int(dir.Fd())), controlName)
}

// listenControl opens the control socket in dir. The caller owns the folder's
// lock, so that a socket found there is a dead daemon's.
func listenControl(dir string) (net.Listener, error) {
	if err := os.Remove(filepath.Join(dir, controlName)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("open the control socket: %w", err)
	}
	folder, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open the control socket: %w", err)
	}
	defer folder.Close()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socketPath(folder), Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("open the control socket: %w", err)
	}
	l.SetUnlinkOnClose(false) // its path ends with this function
	return l, errors.Join(os.Chmod(filepath.Join(dir, controlName), 0o600))
}

// controlClient talks to the daemon of one volume or session.
type controlClient struct {
	dial func(context.Context) (*net.UnixConn, error)
	http *http.Client
}

func dialControl(dir string) controlClient {
	return newControlClient(func(ctx context.Context) (*net.UnixConn, error) {
		folder, err := os.Open(dir)
		if err != nil {
			return nil, err
		}
		defer folder.Close()
		d := net.Dialer{Timeout: 5 * time.Second}
		conn, err := d.DialContext(ctx, "unix", socketPath(folder))
		if err != nil {
			return nil, err
		}
		return conn.(*net.UnixConn), nil
	})
}

func newControlClient(dial func(context.Context) (*net.UnixConn, error)) controlClient {
	transport := &http.Transport{
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
		DisableKeepAlives: true,
	}
	return controlClient{dial, &http.Client{Transport: transport}}
}

// hangUp returns a client that closes its half of the connection when ctx ends.
// The daemon sees a client that went away, and its answer still arrives.
func (c controlClient) hangUp(ctx context.Context) controlClient {
	return newControlClient(func(dialing context.Context) (*net.UnixConn, error) {
		conn, err := c.dial(dialing)
		if err == nil {
			context.AfterFunc(ctx, func() { _ = conn.CloseWrite() }) // fails only if it is closed
		}
		return conn, err
	})
}

// call sends a request and returns the body of the answer, which the caller
// closes. errNoDaemon: nobody answers.
func (c controlClient) call(ctx context.Context, method, path string, body io.Reader) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://daemon"+path, body)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, controlError(err)
	}
	if resp.StatusCode == http.StatusOK {
		return resp.Body, nil
	}
	return nil, refusedBy(resp)
}

// controlError says why a daemon could not be asked.
func controlError(err error) error {
	if isAny(err, fs.ErrNotExist, unix.ECONNREFUSED) {
		return fmt.Errorf("%w: %w", errNoDaemon, err)
	}
	return fmt.Errorf("ask the daemon: %w", err)
}

// refusedBy returns the error with which a daemon answers.
func refusedBy(resp *http.Response) error {
	defer resp.Body.Close()
	var e report
	if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<16)).Decode(&e); err != nil {
		return fmt.Errorf("ask the daemon: %s", resp.Status)
	}
	return remoteError{e}
}

// writeError answers a request with an error and its codes.
func writeError(w http.ResponseWriter, err error) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusConflict)
	_ = json.NewEncoder(w).Encode(failure(err)) // the client is gone if this fails
}
