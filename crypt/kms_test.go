package crypt

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/lazyvol/lazyvol/crypt/kmstest"
)

// service is a KMS with one key, which has the alias "alias/disks".
type service struct {
	*kmstest.Server
	arn string
	at  string // its endpoint
}

func newService(t *testing.T) *service {
	t.Helper()
	s := &service{Server: kmstest.New()}
	s.arn = s.CreateKey("alias/disks")
	server := httptest.NewServer(s)
	t.Cleanup(server.Close)
	s.at = server.URL
	return s
}

// uri names a key of the service.
func (s *service) uri(key string) string {
	query := url.Values{"endpoint": {s.at}}
	if !strings.HasPrefix(key, "arn:") {
		query.Set("region", kmstest.Region)
	}
	return "awskms:///" + key + "?" + query.Encode()
}

// both makes both calls under a key: the second with what wrapped holds.
func (s *service) both(ctx context.Context, keys *Keys, key string, wrapped []byte) map[string]error {
	_, _, _, generate := keys.Generate(ctx, s.uri(key), lineage)
	_, unwrap := keys.Unwrap(ctx, s.uri(key), wrapped, lineage)
	return map[string]error{"generate": generate, "unwrap": unwrap}
}

func (s *service) wrapped(t *testing.T) []byte {
	t.Helper()
	_, wrapped, _, err := NewKeys(Options{}).Generate(t.Context(), s.uri(s.arn), lineage)
	if err != nil {
		t.Fatal(err)
	}
	return wrapped
}

func TestKMSUnwrapsWhatItWrapped(t *testing.T) {
	t.Parallel()
	s := newService(t)
	id := s.arn[strings.Index(s.arn, "key/")+4:]
	for _, name := range []string{s.arn, id, "alias/disks", strings.Replace(s.arn, "key/"+id, "alias/disks", 1)} {
		plain, wrapped, canonical, err := NewKeys(Options{}).Generate(t.Context(), s.uri(name), lineage)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if len(plain) != KeyLen || bytes.Contains(wrapped, plain) {
			t.Errorf("%s: the data key is %x, wrapped %x", name, plain, wrapped)
		}
		if canonical != s.uri(s.arn) {
			t.Errorf("%s: the URI to record is %s, want %s", name, canonical, s.uri(s.arn))
		}
		got, err := NewKeys(Options{}).Unwrap(t.Context(), canonical, wrapped, lineage)
		if err != nil || !bytes.Equal(got, plain) {
			t.Errorf("%s: unwraps to %x (%v), want %x", name, got, err, plain)
		}
	}
	for _, call := range s.Calls() {
		if diff := cmp.Diff(map[string]string{"lazyvol:lineage": lineage}, call.Context); diff != "" {
			t.Errorf("%s: encryption context (-want +got):\n%s", call.Operation, diff)
		}
	}
}

// An alias is pointed at another key: what was wrapped goes on being unwrapped.
func TestRecordedURIOutlivesItsAlias(t *testing.T) {
	t.Parallel()
	s := newService(t)
	keys := NewKeys(Options{})
	plain, wrapped, canonical, err := keys.Generate(t.Context(), s.uri("alias/disks"), lineage)
	if err != nil {
		t.Fatal(err)
	}
	s.CreateKey("alias/disks")
	if got, err := keys.Unwrap(t.Context(), canonical, wrapped, lineage); err != nil || !bytes.Equal(got, plain) {
		t.Errorf("%v", err)
	}
	if _, err := keys.Unwrap(t.Context(), s.uri("alias/disks"), wrapped, lineage); !errors.Is(err, ErrWrongKey) {
		t.Errorf("with the key that has the alias now: %v, want ErrWrongKey", err)
	}
}

func TestKeyWrappedByKMSIsBoundToItsLineage(t *testing.T) {
	t.Parallel()
	s := newService(t)
	wrapped := s.wrapped(t)
	keys := NewKeys(Options{})
	if _, err := keys.Unwrap(t.Context(), s.uri(s.arn), wrapped, "1a2b3c4e"); !errors.Is(err, ErrWrongKey) {
		t.Errorf("for another lineage: %v, want ErrWrongKey", err)
	}
	damaged := bytes.Clone(wrapped)
	damaged[len(damaged)-1] ^= 1
	if _, err := keys.Unwrap(t.Context(), s.uri(s.arn), damaged, lineage); !errors.Is(err, ErrWrongKey) {
		t.Errorf("damaged: %v, want ErrWrongKey", err)
	}
	if _, err := keys.Unwrap(t.Context(), s.uri(s.CreateKey()), wrapped, lineage); !errors.Is(err, ErrWrongKey) {
		t.Errorf("with another key: %v, want ErrWrongKey", err)
	}
	for what, wrapped := range map[string][]byte{"empty": wrapped[:headerLen], "too long": append(wrapped, make([]byte, maxKMSBlob)...)} {
		before := len(s.Calls())
		if _, err := keys.Unwrap(t.Context(), s.uri(s.arn), wrapped, lineage); !errors.Is(err, ErrKeyFormat) || len(s.Calls()) != before {
			t.Errorf("%s: %v, want ErrKeyFormat without a request", what, err)
		}
	}
	_, file := newKeyFile(t)
	if _, err := keys.Unwrap(t.Context(), file, wrapped, lineage); !errors.Is(err, ErrWrongKey) || !strings.Contains(err.Error(), "wrapped by AWS KMS") {
		t.Errorf("with a key file: %v, want ErrWrongKey", err)
	}
}

func TestStateOfAKMSKeyIsToldApart(t *testing.T) {
	t.Parallel()
	s := newService(t)
	wrapped := s.wrapped(t)
	for state, want := range map[kmstest.State]error{
		kmstest.Disabled: ErrKeyDisabled, kmstest.PendingDeletion: ErrKeyDisabled, kmstest.Denied: ErrKeyDenied, kmstest.Asymmetric: ErrKeyURI,
	} {
		s.SetState(s.arn, state)
		before := len(s.Calls())
		for call, err := range s.both(t.Context(), NewKeys(Options{}), s.arn, wrapped) {
			if !errors.Is(err, want) {
				t.Errorf("state %d: %s: %v, want %v", state, call, err, want)
			}
		}
		if n := len(s.Calls()) - before; n != 2 {
			t.Errorf("state %d: %d requests: a refusal is not tried again", state, n)
		}
	}
	s.SetState(s.arn, kmstest.Enabled)
	if _, err := NewKeys(Options{}).Unwrap(t.Context(), s.uri(s.arn), wrapped, lineage); err != nil {
		t.Errorf("enabled again: %v", err)
	}
	s.DeleteKey(s.arn)
	for _, key := range []string{s.arn, "alias/disks", "alias/unknown", "1234abcd-12ab-34cd-56ef-1234567890ab"} {
		for call, err := range s.both(t.Context(), NewKeys(Options{}), key, wrapped) {
			if !errors.Is(err, ErrKeyNotFound) || !strings.Contains(err.Error(), key) {
				t.Errorf("%s: %s: %v, want ErrKeyNotFound", key, call, err)
			}
		}
	}
}

func TestThrottledRequestsAreTriedAgain(t *testing.T) {
	t.Parallel()
	s := newService(t)
	wrapped := s.wrapped(t)
	s.Throttle(3)
	if _, err := NewKeys(Options{}).Unwrap(t.Context(), s.uri(s.arn), wrapped, lineage); err != nil {
		t.Error(err)
	}
	s.Throttle(1 << 30)
	for call, err := range s.both(t.Context(), NewKeys(Options{Total: time.Second}), s.arn, wrapped) {
		if !errors.Is(err, ErrKeyUnavailable) || !strings.Contains(err.Error(), "Throttling") {
			t.Errorf("%s: %v, want ErrKeyUnavailable", call, err)
		}
	}
}

func TestSilentKMSIsGivenUp(t *testing.T) {
	t.Parallel()
	s := newService(t)
	wrapped := s.wrapped(t)
	release := s.Hang()
	defer release()
	keys := NewKeys(Options{Timeout: 100 * time.Millisecond, Total: time.Second})
	if _, err := keys.Unwrap(t.Context(), s.uri(s.arn), wrapped, lineage); !errors.Is(err, ErrKeyUnavailable) || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v, want ErrKeyUnavailable, and not the end of a context of ours", err)
	}
	s.AwaitHung(2) // one that hangs is given up for another
}

func TestAnswerThatStallsIsGivenUp(t *testing.T) {
	t.Parallel()
	requests := make(chan struct{}, 100)
	over := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		requests <- struct{}{}
		w.Header().Set("Content-Length", "1000")
		w.Write([]byte(`{"KeyId":`))
		w.(http.Flusher).Flush()
		<-over
	}))
	t.Cleanup(server.Close)
	defer close(over)
	s := &service{arn: testARN, at: server.URL}
	keys := NewKeys(Options{Timeout: 400 * time.Millisecond, Total: 2 * time.Second})
	if _, _, _, err := keys.Generate(t.Context(), s.uri(s.arn), lineage); !errors.Is(err, ErrKeyUnavailable) {
		t.Errorf("%v, want ErrKeyUnavailable", err)
	}
	if n := len(requests); n < 2 {
		t.Errorf("%d requests, want it to be tried again", n)
	}
}

// A daemon needs its key once in days.
func TestNoConnectionOutlivesItsCall(t *testing.T) {
	t.Parallel()
	s := &service{Server: kmstest.New()}
	s.arn = s.CreateKey()
	closed := make(chan struct{}, 1)
	server := httptest.NewUnstartedServer(s)
	server.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateClosed {
			closed <- struct{}{}
		}
	}
	server.Start()
	t.Cleanup(server.Close)
	s.at = server.URL
	if _, _, _, err := NewKeys(Options{}).Generate(t.Context(), s.uri(s.arn), lineage); err != nil {
		t.Fatal(err)
	}
	select {
	case <-closed:
	case <-time.After(20 * time.Second):
		t.Error("the connection is still open")
	}
}

func TestKMSThatComesBackIsWaitedFor(t *testing.T) {
	t.Parallel()
	s := newService(t)
	wrapped := s.wrapped(t)
	release := s.Hang()
	done := make(chan error)
	go func() {
		keys := NewKeys(Options{Timeout: time.Minute, Total: time.Minute})
		_, err := keys.Unwrap(context.Background(), s.uri(s.arn), wrapped, lineage)
		done <- err
	}()
	s.AwaitHung(1)
	release()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestCallerMayGiveUpOnKMS(t *testing.T) {
	t.Parallel()
	s := newService(t)
	wrapped := s.wrapped(t)
	gone := errors.New("the caller is gone")
	for what, refuse := range map[string]func(){
		"throttled": func() { s.Throttle(1 << 30) },
		"silent":    func() { t.Cleanup(s.Hang()) },
	} {
		refuse()
		ctx, cancel := context.WithCancelCause(t.Context())
		timer := time.AfterFunc(200*time.Millisecond, func() { cancel(gone) })
		_, err := NewKeys(Options{Timeout: time.Minute, Total: time.Minute}).Unwrap(ctx, s.uri(s.arn), wrapped, lineage)
		timer.Stop()
		cancel(nil)
		if !errors.Is(err, gone) || errors.Is(err, ErrKeyUnavailable) {
			t.Errorf("%s: %v, want the caller's reason", what, err)
		}
	}
}

func TestUnreachableKMSIsUnavailable(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := &service{arn: testARN, at: "http://" + listener.Addr().String()}
	listener.Close()
	broken := func(status int, body string) *service {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(status)
			w.Write([]byte(body))
		}))
		t.Cleanup(server.Close)
		return &service{arn: testARN, at: server.URL}
	}
	breaksOff := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "1000")
		w.Write([]byte(`{"KeyId":`))
	}))
	t.Cleanup(breaksOff.Close)
	for what, s := range map[string]*service{
		"nobody listens": nobody,
		"a proxy's 502":  broken(502, "<html>bad gateway</html>"),
		"a 503":          broken(503, ""),
		"garbage":        broken(200, "<html>welcome to the hotel</html>"),
		"breaks off":     {arn: testARN, at: breaksOff.URL},
		"endless":        broken(200, `{"KeyId":"`+strings.Repeat("a", 2*kmsMaxResponse)+`"}`),
	} {
		for call, err := range s.both(t.Context(), NewKeys(Options{Total: 100 * time.Millisecond}), s.arn, encodeKMSWrapped([]byte("blob"))) {
			if !errors.Is(err, ErrKeyUnavailable) {
				t.Errorf("%s: %s: %v, want ErrKeyUnavailable", what, call, err)
			}
		}
	}
}

// What KMS answers is believed only if it is a data key, and in no error.
func TestSenselessAnswersOfKMSAreRefused(t *testing.T) {
	t.Parallel()
	s := newService(t)
	wrapped := s.wrapped(t)
	secret := bytes.Repeat([]byte("sEcReT!!"), 2) // too short for a data key
	inBase64 := base64.StdEncoding.EncodeToString(secret)
	for what, answer := range map[string]string{
		"short":                             fmt.Sprintf(`{"KeyId":%q,"Plaintext":%q,"CiphertextBlob":"AAAA"}`, s.arn, inBase64),
		"none":                              fmt.Sprintf(`{"KeyId":%q}`, s.arn),
		"empty":                             `{}`,
		"no base64, which would be retried": fmt.Sprintf(`{"KeyId":%q,"Plaintext":"%s!"}`, s.arn, inBase64),
	} {
		s.Mangle(func([]byte) []byte { return []byte(answer) })
		for call, err := range s.both(t.Context(), NewKeys(Options{Total: 100 * time.Millisecond}), s.arn, wrapped) {
			if err == nil {
				t.Errorf("%s: %s: no error", what, call)
				continue
			}
			for _, form := range []string{string(secret), inBase64, hex.EncodeToString(secret), fmt.Sprint(secret)} {
				if strings.Contains(err.Error(), form) {
					t.Errorf("%s: %s: the error tells the key: %v", what, call, err)
				}
			}
		}
	}
	for what, replace := range map[string][2]string{
		"no key id":   {s.arn, ""},
		"no wrapping": {"CiphertextBlob", "Blob"},
	} {
		s.Mangle(func(answer []byte) []byte {
			return bytes.ReplaceAll(answer, []byte(replace[0]), []byte(replace[1]))
		})
		if _, _, _, err := NewKeys(Options{}).Generate(t.Context(), s.uri(s.arn), lineage); err == nil {
			t.Errorf("%s: no error", what)
		}
	}
}

// Each region, endpoint and profile is another client; the same is not loaded twice.
func TestClientsAreKeptByWhereTheyAsk(t *testing.T) {
	t.Parallel()
	one, two := newService(t), newService(t)
	keys := NewKeys(Options{})
	for range 2 {
		for _, s := range []*service{one, two} {
			if _, _, _, err := keys.Generate(t.Context(), s.uri(s.arn), lineage); err != nil {
				t.Fatal(err)
			}
			if _, _, _, err := keys.Generate(t.Context(), s.uri("alias/disks"), lineage); err != nil {
				t.Fatal(err)
			}
		}
	}
	if len(keys.clients) != 2 {
		t.Errorf("%d clients, want one for each endpoint", len(keys.clients))
	}
}

func TestCallsToKMSAreConcurrent(t *testing.T) {
	t.Parallel()
	s := newService(t)
	wrapped := s.wrapped(t)
	release := s.Hang()
	keys := NewKeys(Options{Timeout: time.Minute, Total: time.Minute})
	const callers = 8
	errs := make(chan error)
	for range callers {
		go func() {
			_, err := keys.Unwrap(context.Background(), s.uri(s.arn), wrapped, lineage)
			errs <- err
		}()
	}
	s.AwaitHung(callers) // all of them, at the same time
	release()
	for range callers {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}

func TestKMSEndpointOfTheEnvironmentIsUsed(t *testing.T) {
	s := newService(t)
	for _, name := range []string{"AWS_ENDPOINT_URL_KMS", "AWS_ENDPOINT_URL"} {
		t.Run(name, func(t *testing.T) {
			t.Setenv(name, s.at)
			t.Setenv("AWS_REGION", kmstest.Region)
			keys := NewKeys(Options{})
			plain, wrapped, canonical, err := keys.Generate(t.Context(), "awskms:///alias/disks", lineage)
			if err != nil {
				t.Fatal(err)
			}
			if canonical != "awskms:///"+s.arn {
				t.Errorf("the URI to record is %s", canonical)
			}
			t.Setenv("AWS_REGION", "us-east-1") // the ARN's counts
			if got, err := NewKeys(Options{}).Unwrap(t.Context(), canonical, wrapped, lineage); err != nil || !bytes.Equal(got, plain) {
				t.Errorf("%v", err)
			}
		})
	}
}

func TestKeyWithoutARegionIsRefused(t *testing.T) {
	_, _, _, err := NewKeys(Options{}).Generate(t.Context(), "awskms:///alias/disks", lineage)
	if !errors.Is(err, ErrKeyURI) || !strings.Contains(err.Error(), "?region=") {
		t.Errorf("%v, want ErrKeyURI with what to do", err)
	}
}

func TestHostWithoutCredentialsIsDenied(t *testing.T) {
	s := newService(t)
	wrapped := s.wrapped(t)
	t.Setenv("AWS_ACCESS_KEY_ID", "")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "")
	for call, err := range s.both(t.Context(), NewKeys(Options{}), s.arn, wrapped) {
		if !errors.Is(err, ErrKeyDenied) || !strings.Contains(err.Error(), "no AWS credentials") {
			t.Errorf("%s: %v, want ErrKeyDenied", call, err)
		}
	}
}

// The metadata service of EC2 does not answer elsewhere. That is no outage.
func TestHostOutsideEC2WithoutCredentialsIsDenied(t *testing.T) {
	s := newService(t)
	wrapped := s.wrapped(t)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://"+listener.Addr().String())
	listener.Close()
	t.Setenv("AWS_EC2_METADATA_DISABLED", "")
	t.Setenv("AWS_ACCESS_KEY_ID", "")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "")
	if _, err := NewKeys(Options{}).Unwrap(t.Context(), s.uri(s.arn), wrapped, lineage); !errors.Is(err, ErrKeyDenied) {
		t.Errorf("%v, want ErrKeyDenied", err)
	}
}

// A profile is one host's. Others unwrap with the credentials they have, but no key
// is drawn with credentials that were not asked for.
func TestProfileIsRecordedAndNotNeededElsewhere(t *testing.T) {
	s := newService(t)
	file := filepath.Join(t.TempDir(), "config")
	if err := os.WriteFile(file, []byte("[profile disks]\naws_access_key_id = other\naws_secret_access_key = other\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	uri := s.uri(s.arn) + "&profile=disks"
	t.Setenv("AWS_CONFIG_FILE", file)
	_, wrapped, canonical, err := NewKeys(Options{}).Generate(t.Context(), uri, lineage)
	if err != nil || canonical != uri {
		t.Fatalf("the URI to record is %s (%v), want %s", canonical, err, uri)
	}
	t.Setenv("AWS_CONFIG_FILE", os.DevNull)
	if _, err := NewKeys(Options{}).Unwrap(t.Context(), canonical, wrapped, lineage); err != nil {
		t.Errorf("on another host: %v", err)
	}
	if _, _, _, err := NewKeys(Options{}).Generate(t.Context(), uri, lineage); !errors.Is(err, ErrKeyURI) || !strings.Contains(err.Error(), "disks") {
		t.Errorf("a missing profile: %v, want ErrKeyURI", err)
	}
}

// Retries are few and far between: a service that is down is not kept there.
func TestRetriesBackOff(t *testing.T) {
	t.Parallel()
	s := newService(t)
	var at []time.Time
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		at = append(at, time.Now())
		w.WriteHeader(http.StatusServiceUnavailable)
	}))
	s.at = server.URL
	_, _, _, err := NewKeys(Options{Total: 2 * time.Second}).Generate(t.Context(), s.uri(s.arn), lineage)
	server.Close()
	if !errors.Is(err, ErrKeyUnavailable) {
		t.Fatal(err)
	}
	if len(at) < 2 {
		t.Fatalf("%d requests, want it to be tried again", len(at))
	}
	var waits []time.Duration
	for i := range at[1:] {
		waits = append(waits, at[i+1].Sub(at[i]))
	}
	// The first ones take 25, 50, 100 ms … at least; a slow machine makes fewer.
	for i, wait := range waits {
		if least := min(kmsFirstWait<<i, kmsMaxWait) / 2; wait < least*9/10 {
			t.Errorf("the wait %d was %v, want %v at least: %v", i, wait, least, waits)
		}
	}
}
