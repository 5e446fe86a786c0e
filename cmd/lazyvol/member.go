package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
	"github.com/lazyvol/lazyvol/volume"
)

// What a coordinator orders a member of a set to do, in this order: see
// volume.Member. Each is answered. To finish may be ordered at any time.
const (
	doReady   = "ready"
	doHold    = "hold"
	doCut     = "cut"
	doRelease = "release"
	doUpload  = "upload"
	doFinish  = "finish"
)

// setRequest asks a daemon to let its volume join a set: a line begins, of orders
// and replies. If it breaks the set is aborted.
type setRequest struct {
	Set         manifest.SetID    `json:"set"`
	Description string            `json:"description,omitempty"`
	Tags        map[string]string `json:"tags,omitempty"`
}

type setOrder struct {
	Do string `json:"do"`
}

// setReply answers an order, if Did names it, or tells of an upload how far it is.
type setReply struct {
	Did        string            `json:"did,omitempty"`
	Snapshot   string            `json:"snapshot,omitempty"` // its id, once its intent is in the store
	DoneBytes  int64             `json:"doneBytes,omitempty"`
	TotalBytes int64             `json:"totalBytes,omitempty"`
	Outcome    *manifest.Outcome `json:"outcome,omitempty"`   // of an upload
	Committed  bool              `json:"committed,omitempty"` // when it has finished
	report
}

// setProtocol is what the connection on which a volume joins a set changes to.
const setProtocol = "lazyvol-set"

// A line is one end of the connection between a coordinator and a member: JSON,
// both ways.
type line struct {
	conn net.Conn
	in   *json.Decoder

	mu  sync.Mutex // guards out
	out *json.Encoder
}

func newLine(conn net.Conn, r io.Reader) *line {
	return &line{conn: conn, in: json.NewDecoder(r), out: json.NewEncoder(conn)}
}

// send sends a message, to who reads or is dead.
func (l *line) send(message any) error {
	const patience = time.Minute
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.conn.SetWriteDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	return l.out.Encode(message)
}

// join asks the daemon of a volume to join a set. errNoDaemon: there is none.
func (c controlClient) join(ctx context.Context, request setRequest) (*line, error) {
	body, err := json.Marshal(request)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, "POST", "http://daemon/set", bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", setProtocol)
	conn, err := c.dial(ctx)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errNoDaemon, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) }) // fails only if it is closed
	r := bufio.NewReader(conn)
	if err = req.Write(conn); err == nil {
		var resp *http.Response
		if resp, err = http.ReadResponse(r, req); err == nil && resp.StatusCode != http.StatusSwitchingProtocols {
			err = refusedBy(resp)
		}
	}
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return newLine(conn, r), nil
}

// serveSet lets the volume join a set.
func (d *daemon) serveSet(work context.Context, w http.ResponseWriter, r *http.Request) {
	var req setRequest
	if err := d.beginMaking(w, r, &req); err != nil {
		writeError(w, err)
		return
	}
	defer d.making.RUnlock()
	member, err := d.volume.Join(req.Set)
	if err != nil {
		writeError(w, err)
		return
	}
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err == nil {
		_, err = fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", setProtocol)
	}
	if err != nil {
		_, finishErr := member.Finish(work)
		d.log.Error("could not join a set", "error", errors.Join(err, finishErr))
		return
	}
	p := part{line: newLine(conn, buffered), member: member, options: volume.SnapshotOptions{Description: req.Description, Tags: req.Tags}}
	ended := d.monitor.snapshotBegins()
	err = p.serve(work)
	ended(err)
	if err != nil {
		d.log.Error("a snapshot of several volumes failed here", "set", req.Set, "error", err)
		select {
		case d.unsettled <- struct{}{}:
		default:
		}
	}
}

// A part is a volume's end of the line in a set.
type part struct {
	line    *line
	member  *volume.Member
	options volume.SnapshotOptions
	turns   chan struct{} // of uploads, which take one each; nil: they take none
}

// errHungUp: the coordinator of a set has gone. errGivenUp: it says that the set
// is not to be.
var (
	errHungUp  = errors.New("who makes the snapshot has gone")
	errGivenUp = errors.New("the snapshot of the other volumes failed")
)

// serve does what the coordinator orders, until it is told to finish, or hangs up,
// or ctx ends: then the store decides. Its error is of that.
func (p *part) serve(ctx context.Context) error {
	orders := make(chan string)
	work, cancel := context.WithCancelCause(ctx)
	served := make(chan struct{})
	var reading sync.WaitGroup
	reading.Go(func() {
		defer close(orders)
		for {
			var order setOrder
			if err := p.line.in.Decode(&order); err != nil {
				cancel(errHungUp)
				return
			}
			if order.Do == doFinish {
				cancel(errGivenUp) // of an upload that is under way
			}
			select {
			case orders <- order.Do:
			case <-served:
				return
			}
		}
	})
	err := p.obey(ctx, work, orders)
	cancel(nil)
	close(served)
	closeErr := p.line.conn.Close()
	reading.Wait()
	return errors.Join(err, closeErr)
}

func (p *part) obey(ctx, work context.Context, orders <-chan string) error {
	for {
		order := doFinish
		select {
		case o, ok := <-orders:
			if ok {
				order = o
			}
		case <-ctx.Done():
		}
		reply := setReply{Did: order}
		if order == doFinish {
			committed, err := p.member.Finish(ctx)
			reply.Committed, reply.report = committed, failed(err)
			_ = p.line.send(reply) // the coordinator may have gone
			return err
		}
		err := p.do(work, order, &reply)
		if err != nil && work.Err() != nil {
			err = errors.Join(context.Cause(work), err)
		}
		reply.report = failed(err)
		_ = p.line.send(reply) // if it cannot be sent nothing comes, and the line ends
	}
}

// failed is failure for what may have succeeded.
func failed(err error) report {
	if err == nil {
		return report{}
	}
	return failure(err)
}

func (p *part) do(ctx context.Context, order string, reply *setReply) error {
	switch order {
	case doReady:
		return p.member.Ready(ctx)
	case doHold:
		return p.member.Hold()
	case doCut:
		return p.member.Cut()
	case doRelease:
		_, err := p.member.Release()
		return err
	case doUpload:
		return p.upload(ctx, reply)
	}
	return usageError{fmt.Errorf("no member of a set does %q", order)}
}

func (p *part) upload(ctx context.Context, reply *setReply) error {
	watch, stop := context.WithCancel(ctx)
	var watching sync.WaitGroup
	o := p.options
	var made *snapshot.Attempt
	o.Cut = func(attempt *snapshot.Attempt) {
		made = attempt
		_ = p.line.send(setReply{Snapshot: attempt.ID().String()}) // who does not hear of it has gone
		watching.Go(func() { p.tell(watch, attempt) })
		if p.turns == nil {
			return
		}
		select {
		case p.turns <- struct{}{}:
			context.AfterFunc(watch, func() { <-p.turns })
		case <-ctx.Done():
		}
	}
	outcome, err := p.member.Upload(ctx, o)
	stop()
	watching.Wait()
	reply.Outcome = &outcome
	if made != nil {
		reply.DoneBytes, reply.TotalBytes = made.Progress()
	}
	return err
}

// tell tells how far the upload is.
func (p *part) tell(ctx context.Context, attempt *snapshot.Attempt) {
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		done, total := attempt.Progress()
		_ = p.line.send(setReply{DoneBytes: done, TotalBytes: total}) // likewise
	}
}
