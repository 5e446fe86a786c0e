// Package kmstest is a stand-in for AWS KMS: the two calls that lazyvol makes, with
// the checks that matter to it, and the faults that the real one does not produce
// on demand. It speaks AWS's JSON 1.1 protocol over HTTP; start it with httptest.
package kmstest

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
)

// Region is where a Server and its keys are: it refuses requests signed for
// another one.
const Region = "eu-test-1"

const arnPrefix = "arn:aws:kms:" + Region + ":111122223333:"

// A State is what a key is good for.
type State int

const (
	Enabled State = iota
	Disabled
	PendingDeletion
	Denied     // by its policy, to everybody
	Asymmetric // it signs, and encrypts no data key
)

// A Call is one request that was answered with neither a throttle nor silence.
type Call struct {
	Operation string            // GenerateDataKey or Decrypt
	KeyID     string            // as the request names the key
	Context   map[string]string // the encryption context
	Error     string            // the code of the refusal, or ""
}

// Server is an http.Handler. It is safe for concurrent use.
type Server struct {
	mu       sync.Mutex // guards all
	keys     map[string]*key
	aliases  map[string]string // from "alias/name" to an ARN
	calls    []Call
	throttle int
	hung     int
	arrived  sync.Cond     // on mu: hung has grown
	silence  chan struct{} // requests wait until it is closed; nil: they do not
	mangle   func([]byte) []byte
}

type key struct {
	state State
	aead  cipher.AEAD
}

// New returns a Server without keys.
func New() *Server {
	s := &Server{keys: make(map[string]*key), aliases: make(map[string]string)}
	s.arrived.L = &s.mu
	return s
}

// CreateKey makes a key and returns its ARN. Aliases that are given ("alias/name")
// point to it from now on.
func (s *Server) CreateKey(aliases ...string) string {
	var id [16]byte
	secret := make([]byte, 32)
	rand.Read(id[:])
	rand.Read(secret)
	block, err := aes.NewCipher(secret)
	if err != nil {
		panic(err) // of a length that fits
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		panic(err)
	}
	arn := fmt.Sprintf("%skey/%x-%x-%x-%x-%x", arnPrefix, id[:4], id[4:6], id[6:8], id[8:10], id[10:])
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keys[arn] = &key{aead: aead}
	for _, alias := range aliases {
		s.aliases[alias] = arn
	}
	return arn
}

// SetState changes what a key is good for.
func (s *Server) SetState(arn string, state State) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keys[arn].state = state
}

// DeleteKey removes a key at once, which AWS takes a week to do.
func (s *Server) DeleteKey(arn string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.keys, arn)
}

// Throttle refuses the next n requests with a ThrottlingException.
func (s *Server) Throttle(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.throttle = n
}

// Hang answers no request, those already made excepted, until the function that it
// returns is called or the client goes away.
func (s *Server) Hang() (release func()) {
	silence := make(chan struct{})
	s.mu.Lock()
	defer s.mu.Unlock()
	s.silence = silence
	return sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.silence = nil
		close(silence)
	})
}

// Mangle passes the bodies of answers through a function, or, if it is nil, no
// longer.
func (s *Server) Mangle(f func([]byte) []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mangle = f
}

// Calls returns the requests answered so far.
func (s *Server) Calls() []Call {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.calls)
}

// AwaitHung waits until n requests, over the time, have met with silence.
func (s *Server) AwaitHung(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.hung < n {
		s.arrived.Wait()
	}
}

// A refusal is an exception of KMS.
type refusal struct {
	status  int
	code    string
	message string
}

func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 64<<10))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if silence := s.silence; silence != nil {
		s.hung++
		s.arrived.Broadcast()
		s.mu.Unlock()
		select {
		case <-silence:
		case <-r.Context().Done():
		}
		s.mu.Lock()
		if r.Context().Err() != nil {
			return // nobody is left to be answered
		}
	}
	answer, refused := s.answer(r, body)
	status := http.StatusOK
	if refused != nil {
		status = refused.status
		answer = map[string]string{"__type": refused.code, "message": refused.message}
	}
	data, err := json.Marshal(answer)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	if s.mangle != nil {
		data = s.mangle(data)
	}
	w.Header().Set("Content-Type", "application/x-amz-json-1.1")
	w.WriteHeader(status)
	w.Write(data)
}

// answer answers one request. The caller holds mu.
func (s *Server) answer(r *http.Request, body []byte) (any, *refusal) {
	authorization := r.Header.Get("Authorization")
	switch {
	case r.Method != http.MethodPost || r.URL.Path != "/" || r.Header.Get("Content-Type") != "application/x-amz-json-1.1":
		return nil, &refusal{404, "UnknownOperationException", ""}
	case !strings.HasPrefix(authorization, "AWS4-HMAC-SHA256 "):
		return nil, &refusal{400, "MissingAuthenticationToken", "the request is not signed"}
	case !strings.Contains(authorization, "/"+Region+"/kms/aws4_request"):
		return nil, &refusal{400, "InvalidSignatureException", "the request is signed for another region"}
	case s.throttle > 0:
		s.throttle--
		return nil, &refusal{400, "ThrottlingException", "You have exceeded the rate"}
	}
	var in input
	if err := json.Unmarshal(body, &in); err != nil {
		return nil, &refusal{400, "SerializationException", err.Error()}
	}
	call := Call{KeyID: in.KeyID, Context: in.EncryptionContext}
	var answer any
	var refused *refusal
	switch target := r.Header.Get("X-Amz-Target"); target {
	case "TrentService.GenerateDataKey":
		call.Operation = "GenerateDataKey"
		answer, refused = s.generate(in)
	case "TrentService.Decrypt":
		call.Operation = "Decrypt"
		answer, refused = s.decrypt(in)
	default:
		return nil, &refusal{400, "UnknownOperationException", target}
	}
	if refused != nil {
		call.Error = refused.code
	}
	s.calls = append(s.calls, call)
	return answer, refused
}

type input struct {
	KeyID             string `json:"KeyId"`
	KeySpec           string
	CiphertextBlob    []byte
	EncryptionContext map[string]string
}

type output struct {
	KeyID               string `json:"KeyId"`
	Plaintext           []byte
	CiphertextBlob      []byte `json:",omitempty"`
	EncryptionAlgorithm string `json:",omitempty"`
}

func (s *Server) generate(in input) (any, *refusal) {
	if in.KeySpec != "AES_256" {
		return nil, &refusal{400, "ValidationException", "want KeySpec AES_256"}
	}
	arn, k, refused := s.usable(in.KeyID)
	if refused != nil {
		return nil, refused
	}
	plain := make([]byte, 32)
	rand.Read(plain)
	blob := append([]byte(arn), 0)
	return output{KeyID: arn, Plaintext: plain, CiphertextBlob: k.aead.Seal(blob, nil, plain, bound(in.EncryptionContext))}, nil
}

func (s *Server) decrypt(in input) (any, *refusal) {
	wrapper, sealed, ok := strings.Cut(string(in.CiphertextBlob), "\x00")
	if !ok || !strings.HasPrefix(wrapper, arnPrefix) {
		return nil, &refusal{400, "InvalidCiphertextException", ""}
	}
	arn, k, refused := s.usable(in.KeyID)
	switch {
	case refused != nil:
		return nil, refused
	case arn != wrapper:
		return nil, &refusal{400, "IncorrectKeyException", "The key ID in the request does not identify a CMK that can perform this operation."}
	}
	plain, err := k.aead.Open(nil, nil, []byte(sealed), bound(in.EncryptionContext))
	if err != nil {
		return nil, &refusal{400, "InvalidCiphertextException", ""}
	}
	return output{KeyID: arn, Plaintext: plain, EncryptionAlgorithm: "SYMMETRIC_DEFAULT"}, nil
}

// usable returns the key that a request names, unless its state forbids the use.
func (s *Server) usable(id string) (arn string, k *key, refused *refusal) {
	switch {
	case strings.HasPrefix(id, arnPrefix+"alias/"):
		arn = s.aliases[strings.TrimPrefix(id, arnPrefix)]
	case strings.HasPrefix(id, "alias/"):
		arn = s.aliases[id]
	case strings.HasPrefix(id, "arn:"):
		arn = id
	default:
		arn = arnPrefix + "key/" + id
	}
	k = s.keys[arn]
	if k == nil {
		return "", nil, &refusal{400, "NotFoundException", fmt.Sprintf("Key '%s' does not exist", id)}
	}
	switch k.state {
	case Disabled:
		return "", nil, &refusal{400, "DisabledException", arn + " is disabled."}
	case PendingDeletion:
		return "", nil, &refusal{400, "KMSInvalidStateException", arn + " is pending deletion."}
	case Denied:
		return "", nil, &refusal{400, "AccessDeniedException", "no resource-based policy allows the action"}
	case Asymmetric:
		return "", nil, &refusal{400, "InvalidKeyUsageException", arn + " key usage is SIGN_VERIFY which is not valid"}
	}
	return arn, k, nil
}

// bound is an encryption context as additional data: JSON sorts its names.
func bound(context map[string]string) []byte {
	data, err := json.Marshal(context)
	if err != nil {
		panic(err) // of a map of strings
	}
	return data
}
