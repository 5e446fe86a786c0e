package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// A tap stands between clients and the S3 server and counts. It understands of
// HTTP what it takes to tell where one message ends; bodies go from socket to
// socket inside the kernel (io.CopyN between two TCP connections is splice), so
// that it costs next to nothing.
type tap struct {
	listener net.Listener
	upstream string
	serving  sync.WaitGroup

	mu       sync.Mutex // guards what follows
	requests []*request // in the order in which they came
	inFlight int
	peak     int                   // most in flight since the last window began
	open     map[net.Conn]struct{} // to be closed at the end
	closed   bool
}

// A request is one that passed.
type request struct {
	method, path   string
	begin, end     time.Time // end is zero while it is in flight
	sent, received int64     // bytes of the bodies
}

func startTap(upstream string) (*tap, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	t := &tap{listener: listener, upstream: upstream, open: make(map[net.Conn]struct{})}
	t.serving.Go(t.accept)
	return t, nil
}

func (t *tap) url() string { return "http://" + t.listener.Addr().String() }

// stop ends all connections.
func (t *tap) stop() {
	_ = t.listener.Close() // nobody connects any more
	t.mu.Lock()
	t.closed = true
	for conn := range t.open {
		_ = conn.Close() // to end who reads from it
	}
	t.mu.Unlock()
	t.serving.Wait()
}

func (t *tap) accept() {
	for {
		client, err := t.listener.Accept()
		if err != nil {
			return
		}
		t.serving.Go(func() { t.serve(client) })
	}
}

// keep makes stop close a connection; false if it has.
func (t *tap) keep(conn net.Conn) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.closed {
		t.open[conn] = struct{}{}
	}
	return !t.closed
}

func (t *tap) leave(conn net.Conn) {
	t.mu.Lock()
	delete(t.open, conn)
	t.mu.Unlock()
	_ = conn.Close() // both sides are done
}

func (t *tap) serve(client net.Conn) {
	defer t.leave(client)
	server, err := net.Dial("tcp", t.upstream)
	if err != nil {
		return
	}
	defer t.leave(server)
	if !t.keep(client) || !t.keep(server) {
		return
	}
	// Small buffers: what lies in one goes through here instead of splice.
	from, back := stream{bufio.NewReaderSize(client, 8<<10), client}, stream{bufio.NewReaderSize(server, 4<<10), server}
	for {
		again, err := t.exchange(from, back)
		if err != nil || !again {
			return // whoever is at the other end notices
		}
	}
}

// exchange passes one request and its response. It returns whether the
// connection serves another.
func (t *tap) exchange(client, server stream) (again bool, err error) {
	head, err := client.head()
	if err != nil {
		return false, err
	}
	r := &request{begin: time.Now()}
	r.method, r.path = head.request()
	var sent, received int64
	t.began(r)
	defer func() { t.ended(r, sent, received) }()
	if _, err := server.conn.Write(head.raw); err != nil {
		return false, err
	}
	if strings.EqualFold(head.field("Expect"), "100-continue") {
		reply, err := server.head()
		if err != nil {
			return false, err
		}
		if _, err := client.conn.Write(reply.raw); err != nil {
			return false, err
		}
		if reply.status() != 100 { // it wants no body, and the client may have begun one
			_, err := io.Copy(client.conn, server.buf)
			return false, err
		}
	}
	if sent, err = copyBody(server.conn, client, head.length(0)); err != nil {
		return false, err
	}
	reply, err := server.head()
	for err == nil && reply.status() == 100 { // unasked for
		if _, err = client.conn.Write(reply.raw); err == nil {
			reply, err = server.head()
		}
	}
	if err != nil {
		return false, err
	}
	if _, err := client.conn.Write(reply.raw); err != nil {
		return false, err
	}
	length := reply.length(untilClosed)
	if r.method == "HEAD" || reply.status() == 204 || reply.status() == 304 {
		length = 0
	}
	received, err = copyBody(client.conn, server, length)
	last := length == untilClosed || strings.EqualFold(reply.field("Connection"), "close")
	return !last, err
}

func (t *tap) began(r *request) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.requests = append(t.requests, r)
	t.inFlight++
	t.peak = max(t.peak, t.inFlight)
}

func (t *tap) ended(r *request, sent, received int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	r.end, r.sent, r.received = time.Now(), sent, received
	t.inFlight--
}

func (t *tap) busy() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.inFlight > 0
}

// A window is what passes the tap from a moment on.
type window struct {
	tap   *tap
	first int
}

// watch begins a window. Of several only the last to begin knows the peak.
func (t *tap) watch() window {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.peak = t.inFlight
	return window{t, len(t.requests)}
}

// traffic is what passed in a window, up to now.
type traffic struct {
	requests []request
	peak     int // most requests in flight
}

// traffic returns it. A client has the end of a response before the tap knows
// that it passed: it gives those a moment.
func (w window) traffic() traffic {
	const moment = 20 * time.Millisecond
	for end := time.Now().Add(moment); w.tap.busy() && time.Now().Before(end); {
		time.Sleep(moment / 100)
	}
	w.tap.mu.Lock()
	defer w.tap.mu.Unlock()
	seen := traffic{peak: w.tap.peak}
	for _, r := range w.tap.requests[w.first:] {
		seen.requests = append(seen.requests, *r)
	}
	return seen
}

// of returns those of the requests with a method, any if "", and a part of
// the path.
func (t traffic) of(method, part string) traffic {
	t.requests = slices.DeleteFunc(slices.Clone(t.requests), func(r request) bool {
		return method != "" && r.method != method || !strings.Contains(r.path, part)
	})
	return t
}

func (t traffic) received() (n int64) {
	for _, r := range t.requests {
		n += r.received
	}
	return n
}

func (t traffic) sent() (n int64) {
	for _, r := range t.requests {
		n += r.sent
	}
	return n
}

// roundTrips returns the length of the longest chain of requests each of which
// began after the one before had ended.
func (t traffic) roundTrips() int { return slices.Max(append(t.depths(), 0)) }

// depths returns for each request the length of the longest chain that ends
// with it.
func (t traffic) depths() []int {
	depths := make([]int, len(t.requests))
	for i, r := range t.requests {
		depths[i] = 1
		for j, before := range t.requests[:i] {
			if !before.end.IsZero() && !before.end.After(r.begin) {
				depths[i] = max(depths[i], depths[j]+1)
			}
		}
	}
	return depths
}

// String lists the requests, each with its place in the longest chain that ends
// with it, and when it began and ended, in milliseconds since the first.
func (t traffic) String() string {
	var list strings.Builder
	for i, depth := range t.depths() {
		r, begin := t.requests[i], t.requests[0].begin
		fmt.Fprintf(&list, "%d %s %s %.1f–%.1f ms\n", depth, r.method, r.path, milliseconds(r.begin.Sub(begin)), milliseconds(r.end.Sub(begin)))
	}
	return list.String()
}

// A stream is one side of a connection that is read.
type stream struct {
	buf  *bufio.Reader
	conn net.Conn
}

// A head is the first part of a message, with the empty line that ends it.
type head struct{ raw []byte }

func (s stream) head() (head, error) {
	const most = 64 << 10
	var raw []byte
	for {
		line, err := s.buf.ReadSlice('\n')
		raw = append(raw, line...)
		switch {
		case err != nil && !errors.Is(err, bufio.ErrBufferFull):
			return head{}, err
		case len(raw) > most:
			return head{}, errors.New("the head of a message is too long")
		case err == nil && len(bytes.TrimRight(line, "\r\n")) == 0:
			return head{raw}, nil
		}
	}
}

func (h head) words() []string {
	line, _, _ := bytes.Cut(h.raw, []byte("\r\n"))
	return append(strings.SplitN(string(line), " ", 3), "", "")
}

func (h head) request() (method, path string) {
	words := h.words()
	return words[0], words[1]
}

func (h head) status() int {
	status, _ := strconv.Atoi(h.words()[1]) // 0 is as good as any other nonsense
	return status
}

// field returns a field's value, "" if it is not there.
func (h head) field(name string) string {
	for line := range bytes.Lines(h.raw) {
		key, value, ok := bytes.Cut(line, []byte(":"))
		if ok && strings.EqualFold(string(key), name) {
			return string(bytes.TrimSpace(value))
		}
	}
	return ""
}

// The lengths of a body that are not known from the head.
const (
	chunked     = -1
	untilClosed = -2
)

// length returns the length of the body; unknown if the head does not tell.
func (h head) length(unknown int64) int64 {
	if strings.Contains(strings.ToLower(h.field("Transfer-Encoding")), "chunked") {
		return chunked
	}
	n, err := strconv.ParseInt(h.field("Content-Length"), 10, 64)
	if err != nil || n < 0 {
		return unknown
	}
	return n
}

// copyBody passes a body on and returns its length.
func copyBody(to net.Conn, from stream, length int64) (int64, error) {
	switch length {
	case chunked:
		return copyChunks(to, from)
	case untilClosed:
		return io.Copy(to, from.buf)
	}
	buffered := min(length, int64(from.buf.Buffered()))
	n, err := io.CopyN(to, from.buf, buffered)
	if err != nil || n == length {
		return n, err
	}
	rest, err := io.CopyN(to, from.conn, length-n)
	return n + rest, err
}

func copyChunks(to net.Conn, from stream) (total int64, err error) {
	for {
		line, err := from.buf.ReadSlice('\n')
		if err != nil {
			return total, err
		}
		if _, err := to.Write(line); err != nil {
			return total, err
		}
		digits, _, _ := strings.Cut(strings.TrimSpace(string(line)), ";")
		size, err := strconv.ParseInt(digits, 16, 64)
		if err != nil || size < 0 {
			return total, fmt.Errorf("chunk of %q bytes", digits)
		}
		if size == 0 { // what follows is a head without a first line
			trailer, err := from.head()
			if err == nil {
				_, err = to.Write(trailer.raw)
			}
			return total, err
		}
		n, err := copyBody(to, from, size+2) // with the line's end
		if err != nil {
			return total, err
		}
		total += n - 2
	}
}
