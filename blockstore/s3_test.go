package blockstore_test

import (
	"bytes"
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/google/go-cmp/cmp"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// fakeTimeout is what the stores on fake servers wait for an answer.
const fakeTimeout = 200 * time.Millisecond

// fakeS3 returns the store in s3://bucket/p on a server that answers with h.
func fakeS3(t *testing.T, h http.HandlerFunc) blockstore.Store {
	t.Helper()
	server := httptest.NewServer(h)
	t.Cleanup(server.Close)
	return fakeS3At(t, server.URL)
}

func fakeS3At(t *testing.T, endpoint string) blockstore.Store {
	t.Helper()
	s, err := blockstore.NewS3(t.Context(), blockstore.S3Config{
		Bucket:      "bucket",
		Prefix:      "p",
		Region:      "us-east-1",
		Endpoint:    endpoint,
		Credentials: credentials.NewStaticCredentialsProvider("key", "secret", ""),
		Timeout:     fakeTimeout,
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// answer writes an S3 error response.
func answer(w http.ResponseWriter, status int, code string) {
	w.Header().Set("Content-Type", "application/xml")
	w.WriteHeader(status)
	if code != "" {
		fmt.Fprintf(w, `<?xml version="1.0"?><Error><Code>%s</Code><Message>a message</Message></Error>`, code)
	}
}

func TestS3ErrorsMeanWhatTheyShould(t *testing.T) {
	// What must not be mistaken for each other.
	all := []error{blockstore.ErrNotExist, blockstore.ErrExists, blockstore.ErrChanged, blockstore.ErrShort,
		blockstore.ErrDenied, blockstore.ErrNoStore, blockstore.ErrUnavailable, manifest.ErrCorrupt}
	reads := []string{"Get", "ReadRange", "List"}
	every := []string{"Get", "ReadRange", "List", "Put", "Put IfAbsent", "Put IfMatch", "Delete"}
	tests := []struct {
		status int
		code   string
		calls  []string
		want   error // nil: none of the sentinels
	}{
		{404, "NoSuchKey", []string{"Get", "ReadRange"}, blockstore.ErrNotExist},
		{404, "NoSuchKey", []string{"Put IfMatch"}, blockstore.ErrChanged},
		{404, "NoSuchBucket", every, blockstore.ErrNoStore},
		{404, "SomethingElse", every, nil},
		{404, "", every, nil},
		{403, "AccessDenied", every, blockstore.ErrDenied},
		{403, "SignatureDoesNotMatch", every, blockstore.ErrDenied},
		{403, "", every, blockstore.ErrDenied},
		{401, "", every, blockstore.ErrDenied},
		{400, "ExpiredToken", every, blockstore.ErrDenied},
		{400, "AuthorizationHeaderMalformed", every, nil},
		{400, "RequestTimeout", every, blockstore.ErrUnavailable},
		{412, "PreconditionFailed", []string{"Put IfAbsent"}, blockstore.ErrExists},
		{412, "PreconditionFailed", []string{"Put IfMatch"}, blockstore.ErrChanged},
		{412, "", []string{"Put IfAbsent"}, blockstore.ErrExists},
		{412, "PreconditionFailed", reads, nil},
		{409, "ConditionalRequestConflict", []string{"Put IfAbsent", "Put IfMatch"}, blockstore.ErrUnavailable},
		{409, "OperationAborted", every, blockstore.ErrUnavailable},
		{416, "InvalidRange", []string{"ReadRange"}, blockstore.ErrShort},
		{416, "", []string{"ReadRange"}, blockstore.ErrShort},
		{501, "NotImplemented", every, nil},
		{503, "SlowDown", every, blockstore.ErrUnavailable},
		{503, "", every, blockstore.ErrUnavailable},
		{500, "InternalError", every, blockstore.ErrUnavailable},
		{502, "", every, blockstore.ErrUnavailable},
		{504, "", every, blockstore.ErrUnavailable},
		{429, "TooManyRequests", every, blockstore.ErrUnavailable},
		{301, "PermanentRedirect", every, nil},
	}
	var reply atomic.Pointer[http.HandlerFunc]
	s := fakeS3(t, func(w http.ResponseWriter, r *http.Request) { (*reply.Load())(w, r) })
	for _, test := range tests {
		h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { answer(w, test.status, test.code) })
		reply.Store(&h)
		errs := callAll(t.Context(), s)
		_, errs["Put IfMatch"] = s.Put(t.Context(), "k", []byte("data"), blockstore.IfMatch("etag"))
		for _, call := range test.calls {
			err := errs[call]
			if err == nil {
				t.Errorf("%d %s: %s succeeded", test.status, test.code, call)
			}
			for _, sentinel := range all {
				if got := errors.Is(err, sentinel); got != (sentinel == test.want) {
					t.Errorf("%d %s: %s: got error %v; that it is %q is %v", test.status, test.code, call, err, sentinel, got)
				}
			}
		}
	}
}

// What a server says of when to ask again comes with the error, if that is one
// after which to ask again.
func TestS3ErrorsTellWhenToAskAgain(t *testing.T) {
	for _, test := range []struct {
		status int
		header string
		want   time.Duration
	}{
		{503, "7", 7 * time.Second},
		{429, "60", time.Minute},
		{503, "2147483647", 2147483647 * time.Second},
		{503, "", 0},
		{503, "0", 0},
		{503, "-1", 0},
		{503, "99999999999999999999", 0},
		{503, "Wed, 21 Oct 2015 07:28:00 GMT", 0},
		{403, "7", 0},
	} {
		s := fakeS3(t, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Retry-After", test.header)
			answer(w, test.status, "")
		})
		for call, err := range callAll(t.Context(), s) {
			if got := blockstore.AskedPause(err); err == nil || got != test.want {
				t.Errorf("%d with %q: %s: asked for %v, want %v: %v", test.status, test.header, call, got, test.want, err)
			}
		}
	}
}

func TestS3RequestsAreTriedOnceUnlessRetried(t *testing.T) {
	var requests atomic.Int32
	s := fakeS3(t, func(w http.ResponseWriter, r *http.Request) {
		if requests.Add(1)%3 != 0 {
			answer(w, http.StatusServiceUnavailable, "SlowDown")
			return
		}
		w.Header().Set("ETag", `"tag"`)
		io.WriteString(w, "data")
	})
	if _, _, err := s.Get(t.Context(), "k", 100); !errors.Is(err, blockstore.ErrUnavailable) || requests.Load() != 1 {
		t.Errorf("got error %v after %d requests, want %v after 1", err, requests.Load(), blockstore.ErrUnavailable)
	}
	data, etag, err := blockstore.Retry(s, blockstore.RetryPolicy{Base: time.Millisecond}).Get(t.Context(), "k", 100)
	if err != nil || string(data) != "data" || etag != "tag" || requests.Load() != 3 {
		t.Errorf("got %q, %q, %v after %d requests, want the third one's answer", data, etag, err, requests.Load())
	}
}

// hang answers nothing until the client goes away.
func hang(w http.ResponseWriter, r *http.Request) {
	io.Copy(io.Discard, r.Body) // else the server would not notice
	<-r.Context().Done()
}

func TestS3ServerThatHangsIsUnavailable(t *testing.T) {
	s := fakeS3(t, hang)
	for call, err := range callAll(t.Context(), s) {
		if !errors.Is(err, blockstore.ErrUnavailable) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
			t.Errorf("%s: got error %v, want %v, and not that the caller's context is done", call, err, blockstore.ErrUnavailable)
		}
	}
}

func TestS3CallEndsWithItsContext(t *testing.T) {
	s := fakeS3(t, hang)
	cause := errors.New("the cause")
	for range 2 { // a new context for every call would do no more
		ctx, cancel := context.WithTimeoutCause(t.Context(), 20*time.Millisecond, cause)
		for call, err := range callAll(ctx, s) {
			if !errors.Is(err, cause) || errors.Is(err, blockstore.ErrUnavailable) {
				t.Errorf("%s: got error %v, want %v", call, err, cause)
			}
		}
		cancel()
	}
}

func TestS3BodyThatTricklesIsUnavailable(t *testing.T) {
	const size = 8 << 10 // a 16th of a second at the slowest rate
	s := fakeS3(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(size))
		w.Header().Set("ETag", `"tag"`)
		if r.Header.Get("Range") != "" {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes 0-%d/%d", size-1, size))
			w.WriteHeader(http.StatusPartialContent)
		}
		for r.Context().Err() == nil {
			io.WriteString(w, "x")
			w.(http.Flusher).Flush()
			time.Sleep(5 * time.Millisecond)
		}
	})
	begin := time.Now()
	if _, _, err := s.Get(t.Context(), "k", 1<<40); !errors.Is(err, blockstore.ErrUnavailable) {
		t.Errorf("get: got error %v, want %v", err, blockstore.ErrUnavailable)
	}
	if err := s.ReadRange(t.Context(), "k", 0, make([]byte, size)); !errors.Is(err, blockstore.ErrUnavailable) {
		t.Errorf("read: got error %v, want %v", err, blockstore.ErrUnavailable)
	}
	if took := time.Since(begin); took > 10*fakeTimeout {
		t.Errorf("two calls took %v", took)
	}
}

func TestS3BodyThatBreaksOffIsUnavailable(t *testing.T) {
	s := fakeS3(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("ETag", `"tag"`)
		w.Header().Set("Content-Length", "10")
		if r.Header.Get("Range") != "" {
			w.Header().Set("Content-Range", "bytes 0-9/10")
			w.WriteHeader(http.StatusPartialContent)
		}
		io.WriteString(w, "01234") // and the server closes the connection
	})
	_, _, err := s.Get(t.Context(), "k", 100)
	if !errors.Is(err, blockstore.ErrUnavailable) || errors.Is(err, blockstore.ErrShort) {
		t.Errorf("get: got error %v, want %v", err, blockstore.ErrUnavailable)
	}
	err = s.ReadRange(t.Context(), "k", 0, make([]byte, 10))
	if !errors.Is(err, blockstore.ErrUnavailable) || errors.Is(err, blockstore.ErrShort) {
		t.Errorf("read: got error %v, want %v", err, blockstore.ErrUnavailable)
	}
	err = s.List(t.Context(), "", func(blockstore.Info) error { return nil }) // half a listing, as it were
	if !errors.Is(err, blockstore.ErrUnavailable) {
		t.Errorf("list: got error %v, want %v", err, blockstore.ErrUnavailable)
	}
}

func TestS3RangeIsWhatTheServerSaysItIs(t *testing.T) {
	const object = "0123456789"
	for name, test := range map[string]struct {
		status       int
		contentRange string
		body         string
		want         string
		err          error // nil and no want: an error that is no sentinel
	}{
		"AsAsked":              {206, "bytes 2-5/10", "2345", "2345", nil},
		"SizeUnknown":          {206, "bytes 2-5/*", "2345", "2345", nil},
		"ObjectEnds":           {206, "bytes 2-3/4", "23", "", blockstore.ErrShort},
		"OtherStart":           {206, "bytes 0-3/10", "0123", "", nil},
		"Longer":               {206, "bytes 2-9/10", "23456789", "", nil},
		"WholeObject":          {200, "", object, "", nil},
		"PartialWithoutHeader": {206, "", "2345", "", nil},
		"Malformed":            {206, "2-5/10", "2345", "", nil},
		"Backwards":            {206, "bytes 5-2/10", "2345", "", nil},
		"BodyShorterThanRange": {206, "bytes 2-5/10", "23", "", blockstore.ErrUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			s := fakeS3(t, func(w http.ResponseWriter, r *http.Request) {
				if got := r.Header.Get("Range"); got != "bytes=2-5" {
					t.Errorf("asked for %q", got)
				}
				if test.contentRange != "" {
					w.Header().Set("Content-Range", test.contentRange)
				}
				w.WriteHeader(test.status)
				io.WriteString(w, test.body)
			})
			p := []byte("####")
			err := s.ReadRange(t.Context(), "k", 2, p)
			switch {
			case test.want != "":
				if err != nil || string(p) != test.want {
					t.Errorf("got %q, %v, want %q", p, err, test.want)
				}
			case err == nil:
				t.Errorf("got %q, want an error", p)
			case test.err != nil && !errors.Is(err, test.err):
				t.Errorf("got error %v, want %v", err, test.err)
			case test.err == nil && (errors.Is(err, blockstore.ErrShort) || errors.Is(err, blockstore.ErrUnavailable) || errors.Is(err, blockstore.ErrNotExist)):
				t.Errorf("got error %v, want one that is not an answer", err)
			}
		})
	}
}

func FuzzParseContentRange(f *testing.F) {
	for _, seed := range []string{"bytes 0-9/10", "bytes 0-9/*", "bytes */10", "bytes 9-0/10", "bytes -1-2/3", "bytes 0-99999999999999999999/1", ""} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, header string) {
		first, last, err := blockstore.ParseContentRange(header)
		if err == nil && (first < 0 || last < first || !strings.HasPrefix(header, "bytes")) {
			t.Errorf("%q parsed as %d to %d", header, first, last)
		}
	})
}

func TestS3GetReadsNoMoreThanItsLimit(t *testing.T) {
	var sent atomic.Int64
	for _, announced := range []bool{true, false} {
		s := fakeS3(t, func(w http.ResponseWriter, r *http.Request) {
			if announced {
				w.Header().Set("Content-Length", fmt.Sprint(1<<40))
			}
			chunk := make([]byte, 64<<10)
			for {
				n, err := w.Write(chunk)
				sent.Add(int64(n))
				if err != nil {
					return
				}
			}
		})
		if _, _, err := s.Get(t.Context(), "k", 100<<10); !errors.Is(err, blockstore.ErrTooLarge) {
			t.Errorf("got error %v, want %v", err, blockstore.ErrTooLarge)
		}
	}
	if sent.Load() > 64<<20 { // what fits into sockets and buffers
		t.Errorf("the server got rid of %d bytes", sent.Load())
	}
}

func TestS3GetWorksWithoutALength(t *testing.T) {
	want := strings.Repeat("x", 100<<10)
	s := fakeS3(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("ETag", `"tag"`)
		w.(http.Flusher).Flush() // chunked
		io.WriteString(w, want)
	})
	if data, _, err := s.Get(t.Context(), "k", int64(len(want))); err != nil || string(data) != want {
		t.Errorf("got %d bytes, %v", len(data), err)
	}
}

func TestS3RequestsAreAsPlainAsCanBe(t *testing.T) {
	var (
		mu          sync.Mutex // guards what follows
		connections = map[string]bool{}
		headers     = map[string]http.Header{}
	)
	s := fakeS3(t, func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		mu.Lock()
		connections[r.RemoteAddr] = true
		headers[r.Method] = r.Header
		mu.Unlock()
		if r.ProtoMajor != 1 || !strings.HasPrefix(r.URL.Path, "/bucket/p/dir/k") {
			t.Errorf("%s request for %s", r.Proto, r.URL.Path)
		}
		w.Header().Set("ETag", `"tag"`)
		if r.Method == http.MethodPut && string(body) != "data" {
			t.Errorf("put sent %q", body)
		}
	})
	for range 5 {
		if _, err := s.Put(t.Context(), "dir/k", []byte("data"), blockstore.IfMatch("old")); err != nil {
			t.Fatal(err)
		}
		if _, _, err := s.Get(t.Context(), "dir/k", 100); err != nil {
			t.Fatal(err)
		}
	}
	if len(connections) != 1 {
		t.Errorf("10 requests, one after the other, took %d connections", len(connections))
	}
	put, get := headers[http.MethodPut], headers[http.MethodGet]
	if got := put.Get("If-Match"); got != `"old"` {
		t.Errorf("the put has If-Match %s", got)
	}
	const sha256OfData = "3a6eb0790f39ac87c94f3856b2dd2c5d110e6811602261a9a923d3bb23adc8b7"
	if got := put.Get("X-Amz-Content-Sha256"); got != sha256OfData {
		t.Errorf("over plain HTTP the put's payload is signed as %s, want its SHA-256", got)
	}
	for name := range put {
		if strings.Contains(strings.ToLower(name), "checksum") || name == "X-Amz-Trailer" || name == "Content-Encoding" {
			t.Errorf("the put has the header %s: %s", name, put.Get(name))
		}
	}
	if got := get.Get("Accept-Encoding"); strings.Contains(got, "gzip") {
		t.Errorf("the get accepts the encoding %q", got)
	}
	if got := get.Get("X-Amz-Checksum-Mode"); got != "" {
		t.Errorf("the get asks for checksums: %q", got)
	}
}

func TestS3DeleteSendsBatchesAndReportsEachFailure(t *testing.T) {
	var batches []int
	s := fakeS3(t, func(w http.ResponseWriter, r *http.Request) {
		var request struct{ Object []struct{ Key string } }
		if err := xml.NewDecoder(r.Body).Decode(&request); err != nil {
			t.Error(err)
		}
		batches = append(batches, len(request.Object))
		var errs bytes.Buffer
		for _, o := range request.Object {
			if code := strings.TrimPrefix(o.Key, "p/code/"); code != o.Key {
				fmt.Fprintf(&errs, "<Error><Key>%s</Key><Code>%s</Code><Message>a message</Message></Error>", o.Key, code)
			}
		}
		fmt.Fprintf(w, "<DeleteResult>%s</DeleteResult>", &errs)
	})
	var keys []string
	for i := range 2100 {
		keys = append(keys, fmt.Sprintf("many/%d", i))
	}
	if err := s.Delete(t.Context(), keys...); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]int{1000, 1000, 100}, batches); diff != "" {
		t.Errorf("batches (-want +got):\n%s", diff)
	}
	for code, want := range map[string]error{
		"NoSuchKey":     nil,
		"AccessDenied":  blockstore.ErrDenied,
		"InternalError": blockstore.ErrUnavailable,
		"SlowDown":      blockstore.ErrUnavailable,
	} {
		if err := s.Delete(t.Context(), "fine", "code/"+code, "fine2"); !errors.Is(err, want) {
			t.Errorf("a key failed with %s: got error %v, want %v", code, err, want)
		}
	}
	if err := s.Delete(t.Context(), "code/Odd"); err == nil || !strings.Contains(err.Error(), "code/Odd") {
		t.Errorf("got error %v, want one that names the key", err)
	}
}

func TestS3ListingIsCheckedAndAgedByTheServersClock(t *testing.T) {
	now := time.Date(2020, 1, 2, 3, 4, 5, 0, time.UTC) // the server's clock, far from ours
	entry := func(key string, age time.Duration) string {
		return fmt.Sprintf(`<Contents><Key>%s</Key><LastModified>%s</LastModified><ETag>&quot;tag-%s&quot;</ETag><Size>7</Size></Contents>`,
			key, now.Add(-age).Format(time.RFC3339), key)
	}
	const truncated = "<IsTruncated>true</IsTruncated>"
	for name, test := range map[string]struct {
		pages []string
		want  []blockstore.Info
		fails bool
	}{
		"Whole": {
			pages: []string{
				truncated + "<NextContinuationToken>1</NextContinuationToken>" + entry("p/", 0) + entry("p/a", time.Minute),
				entry("p/a b", 0) + entry("p/b", -time.Minute),
			},
			want: []blockstore.Info{
				{Key: "a", Size: 7, ETag: "tag-p/a", Age: time.Minute, Listed: now},
				{Key: "b", Size: 7, ETag: "tag-p/b", Listed: now},
			},
		},
		"NotAscending":     {pages: []string{entry("p/b", 0) + entry("p/a", 0)}, fails: true},
		"Repeating":        {pages: []string{truncated + "<NextContinuationToken>0</NextContinuationToken>" + entry("p/a", 0)}, fails: true},
		"AnotherPrefix":    {pages: []string{entry("q/a", 0)}, fails: true},
		"NoWayToTheNext":   {pages: []string{truncated + entry("p/a", 0)}, fails: true},
		"SecondPageBroken": {pages: []string{truncated + "<NextContinuationToken>1</NextContinuationToken>" + entry("p/a", 0), "<Contents>"}, fails: true},
	} {
		t.Run(name, func(t *testing.T) {
			s := fakeS3(t, func(w http.ResponseWriter, r *http.Request) {
				var page int
				if token := r.FormValue("continuation-token"); token != "" {
					if _, err := fmt.Sscan(token, &page); err != nil {
						t.Error(err)
					}
				}
				w.Header().Set("Date", now.Format(http.TimeFormat))
				fmt.Fprintf(w, "<ListBucketResult>%s</ListBucketResult>", test.pages[page])
			})
			var got []blockstore.Info
			err := s.List(t.Context(), "", func(info blockstore.Info) error {
				got = append(got, info)
				return nil
			})
			if (err != nil) != test.fails {
				t.Fatalf("got error %v; that it fails should be %v", err, test.fails)
			}
			if !test.fails {
				if diff := cmp.Diff(test.want, got); diff != "" {
					t.Errorf("listing (-want +got):\n%s", diff)
				}
			}
		})
	}
}

func TestS3ThatNobodyServesIsUnavailable(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	for call, err := range callAll(t.Context(), fakeS3At(t, "http://"+l.Addr().String())) {
		if !errors.Is(err, blockstore.ErrUnavailable) {
			t.Errorf("%s: got error %v, want %v", call, err, blockstore.ErrUnavailable)
		}
	}
}

func TestS3WithACertificateNobodySignedIsNotRetried(t *testing.T) {
	server := httptest.NewUnstartedServer(http.NotFoundHandler())
	server.Config.ErrorLog = log.New(io.Discard, "", 0) // it would tell of the refusal
	server.StartTLS()
	t.Cleanup(server.Close)
	_, _, err := fakeS3At(t, server.URL).Get(t.Context(), "k", 100)
	if err == nil || errors.Is(err, blockstore.ErrUnavailable) {
		t.Errorf("got error %v, want one that asking again is not worth", err)
	}
}

func TestProbeNamesAServerThatIgnoresIfNoneMatch(t *testing.T) {
	s := fakeS3(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("ETag", `"tag"`) // to every PUT, whatever its conditions
		if r.Method == http.MethodPost {
			io.WriteString(w, "<DeleteResult></DeleteResult>")
		}
	})
	err := blockstore.Probe(t.Context(), s)
	if err == nil || !strings.Contains(err.Error(), "If-None-Match") {
		t.Errorf("got error %v, want one that names If-None-Match", err)
	}
}
