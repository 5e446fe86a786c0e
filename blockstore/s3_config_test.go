package blockstore_test

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore"
)

func TestS3TakesEndpointAndCredentialsFromTheEnvironment(t *testing.T) {
	isolateAWS(t)
	var path, authorization string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		path, authorization = r.URL.Path, r.Header.Get("Authorization")
		w.Header().Set("ETag", `"tag"`)
	}))
	t.Cleanup(server.Close)
	profile := filepath.Join(t.TempDir(), "config")
	err := os.WriteFile(profile, []byte("[profile other]\nregion = eu-north-1\naws_access_key_id = filekey\naws_secret_access_key = secret\nendpoint_url = "+server.URL+"\n"), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	keys := map[string]string{"AWS_ACCESS_KEY_ID": "envkey", "AWS_SECRET_ACCESS_KEY": "secret"}
	for name, test := range map[string]struct {
		url       string
		env       map[string]string
		key       string
		region    string
		otherKeys bool
	}{
		"Variable":      {"s3://bucket/p", map[string]string{"AWS_ENDPOINT_URL": server.URL}, "envkey", "us-east-1", false},
		"S3Variable":    {"s3://bucket/p", map[string]string{"AWS_ENDPOINT_URL_S3": server.URL, "AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "envkey", "us-east-1", false},
		"VariableInURL": {"s3://bucket/p?endpoint=" + server.URL, map[string]string{"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "envkey", "us-east-1", false},
		"Region":        {"s3://bucket/p", map[string]string{"AWS_ENDPOINT_URL": server.URL, "AWS_REGION": "eu-west-1"}, "envkey", "eu-west-1", false},
		"RegionInURL":   {"s3://bucket/p?region=eu-west-2", map[string]string{"AWS_ENDPOINT_URL": server.URL, "AWS_REGION": "eu-west-1"}, "envkey", "eu-west-2", false},
		"ProfileInURL":  {"s3://bucket/p?profile=other", map[string]string{"AWS_CONFIG_FILE": profile}, "filekey", "eu-north-1", true},
	} {
		t.Run(name, func(t *testing.T) {
			for name, value := range keys {
				if !test.otherKeys {
					t.Setenv(name, value)
				}
			}
			for name, value := range test.env {
				t.Setenv(name, value)
			}
			s, err := blockstore.Open(t.Context(), test.url)
			if err != nil {
				t.Fatal(err)
			}
			if _, _, err := s.Get(t.Context(), "k", 100); err != nil {
				t.Fatal(err)
			}
			if path != "/bucket/p/k" {
				t.Errorf("asked for %s, want path style", path)
			}
			if !strings.Contains(authorization, "Credential="+test.key+"/") || !strings.Contains(authorization, "/"+test.region+"/s3/") {
				t.Errorf("signed as %s, want key %s and region %s", authorization, test.key, test.region)
			}
		})
	}
}

func TestS3OnAWSNeedsARegion(t *testing.T) {
	isolateAWS(t)
	t.Setenv("AWS_ACCESS_KEY_ID", "key")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "secret")
	_, err := blockstore.Open(t.Context(), "s3://bucket")
	if err == nil || !strings.Contains(err.Error(), "AWS_REGION") || !strings.Contains(err.Error(), "?region=") {
		t.Errorf("got error %v, want one that says how to name a region", err)
	}
}

func TestS3WithoutCredentialsIsErrDenied(t *testing.T) {
	isolateAWS(t)
	if _, err := blockstore.Open(t.Context(), "s3://bucket?region=eu-central-1"); !errors.Is(err, blockstore.ErrDenied) {
		t.Errorf("got error %v, want %v", err, blockstore.ErrDenied)
	}
}

func TestS3WithAProfileThatIsMissingSaysSo(t *testing.T) {
	isolateAWS(t)
	_, err := blockstore.Open(t.Context(), "s3://bucket?region=eu-central-1&profile=absent")
	if err == nil || !strings.Contains(err.Error(), "absent") {
		t.Errorf("got error %v, want one that names the profile", err)
	}
}
