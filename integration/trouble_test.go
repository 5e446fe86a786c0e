package integration

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// An exchange is a request that a gate answers in the server's place.
type exchange struct {
	w      http.ResponseWriter
	r      *http.Request
	server http.Handler // whom it would have reached
	body   []byte       // of the request
	file   string       // of the object that it names
}

// A trouble is how a store answers wrongly, or not at all.
type trouble func(*exchange)

// A reply is what a server answered.
type reply struct {
	status int
	header http.Header
	body   []byte
}

// pass passes the request on and returns what the server replied.
func (e *exchange) pass() reply {
	e.r.Body = io.NopCloser(bytes.NewReader(e.body))
	recorder := httptest.NewRecorder()
	e.server.ServeHTTP(recorder, e.r)
	return reply{recorder.Code, recorder.Header(), recorder.Body.Bytes()}
}

// answer sends a reply as it is, with the length of its body.
func (e *exchange) answer(r reply) {
	for name, values := range r.header {
		e.w.Header()[name] = values
	}
	e.w.Header().Set("Content-Length", strconv.Itoa(len(r.body)))
	e.w.WriteHeader(r.status)
	_, _ = e.w.Write(r.body) // fails if the client is gone
}

// breakOff sends what fits of a reply into n bytes of body, or more than is its
// own if n is more, under the Content-Length of the whole. Then it ends the
// connection: as servers do, or by a reset.
func (e *exchange) breakOff(r reply, n int, reset bool) {
	e.hijack(reset, func(conn net.Conn) {
		var out bytes.Buffer
		fmt.Fprintf(&out, "HTTP/1.1 %d %s\r\n", r.status, http.StatusText(r.status))
		r.header.Set("Content-Length", strconv.Itoa(len(r.body)))
		_ = r.header.Write(&out) // into memory
		out.WriteString("\r\n")
		out.Write(r.body[:min(n, len(r.body))])
		out.Write(bytes.Repeat([]byte("x"), max(0, n-len(r.body))))
		_, _ = conn.Write(out.Bytes()) // fails if the client is gone
	})
}

// hangUp ends the connection without a reply.
func (e *exchange) hangUp() { e.hijack(true, func(net.Conn) {}) }

func (e *exchange) hijack(reset bool, use func(net.Conn)) {
	conn, _, err := http.NewResponseController(e.w).Hijack()
	if err != nil {
		panic(err) // it is an HTTP/1 server's
	}
	defer conn.Close()
	use(conn)
	if tcp, ok := conn.(*net.TCPConn); ok && reset {
		_ = tcp.SetLinger(0) // Close then resets
	}
}

// says returns the trouble of a server that answers with an error instead of
// doing what it is asked. Pairs of name and value are headers.
func says(status int, code string, header ...string) trouble {
	return func(e *exchange) {
		r := reply{status, http.Header{"Content-Type": {"application/xml"}}, fmt.Appendf(nil,
			`<?xml version="1.0" encoding="UTF-8"?><Error><Code>%s</Code><Message>said by a test</Message><RequestId>1</RequestId></Error>`, code)}
		for i := 0; i+1 < len(header); i += 2 {
			r.header.Set(header[i], header[i+1])
		}
		e.answer(r)
	}
}

// What a network does to a request.
var (
	unheard   trouble = func(e *exchange) { e.hangUp() }
	replyLost trouble = func(e *exchange) { e.pass(); e.hangUp() } // what was asked for is done
	bodyCut   trouble = func(e *exchange) { r := e.pass(); e.breakOff(r, len(r.body)/2, false) }
	bodyReset trouble = func(e *exchange) { r := e.pass(); e.breakOff(r, len(r.body)/2, true) }
	bodyLong  trouble = func(e *exchange) { r := e.pass(); e.breakOff(r, len(r.body)+1000, false) }
)

// sentTwice is a request that arrives a second time right after the first, whose
// reply is what counts.
var sentTwice trouble = func(e *exchange) {
	r := e.pass()
	e.pass()
	e.answer(r)
}

// bodyShort is a reply that is complete in itself, and half of what it should be:
// a listing that ends in the middle of its XML.
var bodyShort trouble = func(e *exchange) {
	r := e.pass()
	r.body = r.body[:len(r.body)/2]
	e.answer(r)
}

// bitFlipped is a reply with one bit of its body inverted.
var bitFlipped trouble = func(e *exchange) {
	r := e.pass()
	if n := len(r.body); n > 0 {
		r.body[n/2] ^= 0x10
	}
	e.answer(r)
}

// rangeWrong is the reply to a ranged read with bytes from further on, which it
// says.
var rangeWrong trouble = func(e *exchange) {
	r := e.pass()
	var first, last, size int64
	if _, err := fmt.Sscanf(r.header.Get("Content-Range"), "bytes %d-%d/%d", &first, &last, &size); err == nil {
		r.header.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", first+512, last+512, size))
	}
	e.answer(r)
}

// rangeIgnored is the whole object in reply to a ranged read.
var rangeIgnored trouble = func(e *exchange) {
	data, err := os.ReadFile(e.file)
	if err != nil || e.r.Header.Get("Range") == "" {
		e.answer(e.pass())
		return
	}
	e.answer(reply{http.StatusOK, http.Header{"Etag": {`"1"`}}, data})
}

// deletesNothing is a removal of several objects that succeeds, and says of each
// of them that it failed.
var deletesNothing trouble = func(e *exchange) {
	var out strings.Builder
	out.WriteString(`<?xml version="1.0" encoding="UTF-8"?><DeleteResult>`)
	for _, part := range strings.Split(string(e.body), "<Key>")[1:] {
		key, _, _ := strings.Cut(part, "</Key>")
		fmt.Fprintf(&out, "<Error><Key>%s</Key><Code>InternalError</Code><Message>said by a test</Message></Error>", key)
	}
	out.WriteString(`</DeleteResult>`)
	e.answer(reply{http.StatusOK, http.Header{"Content-Type": {"application/xml"}}, []byte(out.String())})
}

// all matches every request.
func all(*http.Request) bool { return true }

// method returns what matches requests of a method.
func method(name string) match { return func(r *http.Request) bool { return r.Method == name } }

// listings matches listings.
func listings(r *http.Request) bool {
	return r.Method == http.MethodGet && r.URL.Query().Has("list-type")
}

// conditional matches puts that may fail for what is there.
func conditional(r *http.Request) bool {
	return r.Method == http.MethodPut && (r.Header.Get("If-None-Match") != "" || r.Header.Get("If-Match") != "")
}

// ranged matches reads of a part of an object.
func ranged(r *http.Request) bool { return r.Method == http.MethodGet && r.Header.Get("Range") != "" }

// objects matches reads of objects, whole or in part.
func objects(r *http.Request) bool { return r.Method == http.MethodGet && !listings(r) }

// first returns what matches the first n tries of each request that a match
// chooses, and not those after. Tries of the same are those with the same name,
// range and content.
func first(n int, of match) match {
	var mu sync.Mutex // guards tries
	tries := make(map[string]int)
	return func(r *http.Request) bool {
		if !of(r) {
			return false
		}
		name := sha256.Sum256([]byte(strings.Join([]string{
			r.Method, r.URL.Path, r.URL.RawQuery, r.Header.Get("Range"), r.Header.Get("X-Amz-Content-Sha256"),
		}, "\n")))
		mu.Lock()
		defer mu.Unlock()
		key := hex.EncodeToString(name[:])
		tries[key]++
		return tries[key] <= n
	}
}

// redrawn returns what matches as a match does, and of the requests that make a
// lineage, each with an id drawn anew, only the first.
func redrawn(of match) match {
	var lineages atomic.Int32
	return func(r *http.Request) bool {
		return of(r) && (!puts("lineages")(r) || lineages.Add(1) == 1)
	}
}

// some returns what matches one request in n of those that a match chooses, at
// random.
func some(seed uint64, n int, of match) match {
	var mu sync.Mutex // guards r
	rng := newRand(seed)
	return func(r *http.Request) bool {
		if !of(r) {
			return false
		}
		mu.Lock()
		defer mu.Unlock()
		return rng.IntN(n) == 0
	}
}

// oDirect is O_DIRECT, for reads that the kernel neither caches nor repeats.
const oDirect = unix.O_DIRECT

func isEIO(err error) bool { return errors.Is(err, syscall.EIO) }
